//! A page as a tree, within bounds that hold while it is built. Afterwards is too late: a formatting element that is
//! never closed is opened anew in every later block, so that a few bytes become many elements, and every tag looks
//! through the stack of open elements, so that depth costs its square.

use std::borrow::Cow;
use std::cell::{Cell, Ref, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use dom_query::{Document, NodeId};
use html5ever::tendril::{StrTendril, TendrilSink};
use html5ever::tree_builder::{ElementFlags, NodeOrText, QuirksMode, TreeBuilderOpts, TreeSink};
use html5ever::{Attribute, ParseOpts, QualName, parse_document};

use super::extract::{ExtractError, MAX_HTML_ATTRIBUTES, MAX_HTML_DEPTH, MAX_HTML_ELEMENTS};

/// Tags `html` and `body` behind the first whose attributes are heeded: each of them looks at all that are there.
const MAX_REPEATED: usize = 16;

/// The page as `dom_smoothie` would parse it, unless it passes a bound.
///
/// # Errors
/// [`ExtractError::TooDeep`], [`ExtractError::TooManyElements`], [`ExtractError::TooManyAttributes`].
pub(super) fn parse(html: &str) -> Result<Document, ExtractError> {
    let tree_builder = TreeBuilderOpts { scripting_enabled: false, ..TreeBuilderOpts::default() };
    let parser = parse_document(Bounded::new(), ParseOpts { tree_builder, ..ParseOpts::default() });
    // A parser cannot be told to stop, so a bound that is passed unwinds it, without the hook that reports panics.
    let parsed = catch_unwind(AssertUnwindSafe(|| parser.one(html)));
    let document = parsed.map_err(|payload| match payload.downcast::<ExtractError>() {
        Ok(error) => *error,
        Err(panic) => resume_unwind(panic),
    })?;
    if is_deeper(&document, MAX_HTML_DEPTH) { Err(ExtractError::TooDeep) } else { Ok(document) }
}

/// Whether an element of the finished tree, template contents left out, lies more than `most` below the root.
fn is_deeper(document: &Document, most: usize) -> bool {
    let mut next = document.root().first_element_child();
    let mut depth = 1;
    while let Some(mut node) = next {
        if depth > most {
            return true;
        }
        next = node.first_element_child();
        if next.is_some() {
            depth += 1;
            continue;
        }
        // The next one behind it, or behind the nearest element around it that has one.
        next = loop {
            match (node.next_element_sibling(), node.parent()) {
                (Some(sibling), _) => break Some(sibling),
                (None, Some(parent)) if depth > 1 => (node, depth) = (parent, depth - 1),
                (None, _) => break None,
            }
        };
    }
    false
}

/// A node, and its place in [`Bounded::depths`].
#[derive(Clone, Copy)]
struct Handle {
    id: NodeId,
    number: usize,
}

/// The tree that is being built, and how much of it there is.
struct Bounded {
    document: Document,
    /// How deep each node lay when it was put there: a bound for the stack of open elements. A node that moved lies higher by
    /// now (foster parents), or deeper: each adoption puts what is in a block into one more element. So the finished tree is
    /// looked at again.
    depths: RefCell<Vec<usize>>,
    elements: Cell<usize>,
    attributes: Cell<usize>,
    repeated: Cell<usize>,
}

impl Bounded {
    fn new() -> Self {
        Self {
            document: Document::default(),
            depths: RefCell::new(vec![0]),
            elements: Cell::new(0),
            attributes: Cell::new(0),
            repeated: Cell::new(0),
        }
    }

    fn handle(&self, id: NodeId) -> Handle {
        let mut depths = self.depths.borrow_mut();
        depths.push(0);
        Handle { id, number: depths.len() - 1 }
    }

    fn depth(&self, node: &Handle) -> usize {
        self.depths.borrow()[node.number]
    }

    /// What is put at `depth`, for the document.
    fn placed(&self, child: NodeOrText<Handle>, depth: usize) -> NodeOrText<NodeId> {
        match child {
            NodeOrText::AppendText(text) => NodeOrText::AppendText(text),
            NodeOrText::AppendNode(node) => {
                if depth > MAX_HTML_DEPTH {
                    stop(ExtractError::TooDeep);
                }
                self.depths.borrow_mut()[node.number] = depth;
                NodeOrText::AppendNode(node.id)
            }
        }
    }
}

/// Ends the parse with `error`: [`parse`] catches it.
fn stop(error: ExtractError) -> ! {
    resume_unwind(Box::new(error))
}

/// The document's own sink, with the bounds before it. Parse errors are of no interest and take memory.
impl TreeSink for Bounded {
    type Handle = Handle;
    type Output = Document;
    type ElemName<'a> = Ref<'a, QualName>;

    fn finish(self) -> Document {
        self.document
    }

    fn parse_error(&self, _: Cow<'static, str>) {}

    fn get_document(&self) -> Handle {
        Handle { id: self.document.get_document(), number: 0 }
    }

    fn elem_name<'a>(&'a self, target: &'a Handle) -> Ref<'a, QualName> {
        self.document.elem_name(&target.id)
    }

    fn create_element(&self, name: QualName, attributes: Vec<Attribute>, flags: ElementFlags) -> Handle {
        self.elements.set(self.elements.get() + 1);
        if self.elements.get() > MAX_HTML_ELEMENTS {
            stop(ExtractError::TooManyElements);
        }
        self.attributes.set(self.attributes.get() + attributes.len());
        if self.attributes.get() > MAX_HTML_ATTRIBUTES {
            stop(ExtractError::TooManyAttributes);
        }
        self.handle(self.document.create_element(name, attributes, flags))
    }

    fn create_comment(&self, text: StrTendril) -> Handle {
        self.handle(self.document.create_comment(text))
    }

    fn create_pi(&self, target: StrTendril, data: StrTendril) -> Handle {
        self.handle(self.document.create_pi(target, data))
    }

    fn append(&self, parent: &Handle, child: NodeOrText<Handle>) {
        let child = self.placed(child, self.depth(parent) + 1);
        self.document.append(&parent.id, child);
    }

    fn append_before_sibling(&self, sibling: &Handle, child: NodeOrText<Handle>) {
        let child = self.placed(child, self.depth(sibling));
        self.document.append_before_sibling(&sibling.id, child);
    }

    /// What may not stand in a table goes before it, but is open above it: it counts as deep as in the table.
    fn append_based_on_parent_node(&self, table: &Handle, before: &Handle, child: NodeOrText<Handle>) {
        let child = self.placed(child, self.depth(table) + 1);
        self.document.append_based_on_parent_node(&table.id, &before.id, child);
    }

    fn append_doctype_to_document(&self, name: StrTendril, public_id: StrTendril, system_id: StrTendril) {
        self.document.append_doctype_to_document(name, public_id, system_id);
    }

    /// The contents of a template lie as deep as in the template itself.
    fn get_template_contents(&self, target: &Handle) -> Handle {
        Handle { id: self.document.get_template_contents(&target.id), number: target.number }
    }

    fn same_node(&self, x: &Handle, y: &Handle) -> bool {
        x.id == y.id
    }

    fn set_quirks_mode(&self, mode: QuirksMode) {
        self.document.set_quirks_mode(mode);
    }

    fn add_attrs_if_missing(&self, target: &Handle, attributes: Vec<Attribute>) {
        self.repeated.set(self.repeated.get() + 1);
        if self.repeated.get() <= MAX_REPEATED {
            self.document.add_attrs_if_missing(&target.id, attributes);
        }
    }

    fn remove_from_parent(&self, target: &Handle) {
        self.document.remove_from_parent(&target.id);
    }

    fn reparent_children(&self, node: &Handle, new_parent: &Handle) {
        self.document.reparent_children(&node.id, &new_parent.id);
    }

    fn is_mathml_annotation_xml_integration_point(&self, handle: &Handle) -> bool {
        self.document.is_mathml_annotation_xml_integration_point(&handle.id)
    }
}

#[cfg(test)]
mod tests {
    use dom_query::NodeRef;
    use proptest::prelude::*;

    use super::*;

    /// How deep the finished tree is, template contents left out.
    fn depth(node: &NodeRef<'_>) -> usize {
        node.children().iter().filter(|child| child.is_element()).map(|child| 1 + depth(child)).max().unwrap_or(0)
    }

    #[test]
    fn the_tree_is_the_one_without_bounds() {
        for html in [
            "",
            "<p>a<p>b<table><tr><td>c</table><i>d<b>e</i>f</b>",
            "<!doctype html><table><b>fostered<tr><td>x</table>y<template><p>z</template>",
            "<svg><desc><p>a</svg><math><mi><b>x</math><select><option>1<option>2</select>",
            "<html lang=en><body class=a><body id=b><title>t</title><textarea></div></textarea>",
        ] {
            assert_eq!(parse(html).unwrap().html(), Document::from(html).html(), "{html}");
        }
    }

    /// Every one of these pages opens elements that stay open though an end tag names them, or that are opened anew.
    #[test]
    fn depth_and_elements_are_bounded_while_the_tree_grows() {
        for piece in [
            "<div>",
            "<div><object></div>",
            "<div><table><tr><td></div>",
            "<span><div></span>",
            "<b><div></b>",
            "<optgroup>",
            "<rt>",
            "<my-a></my-b>",
            "<div title='</div>'>",
            "<div><textarea></div></textarea>",
            "<div><math><mi></div>",
            "<svg><desc><span></svg>",
            "<div><script><!--<script></script></div>--></script>",
            "<template><table><b>",
            "<table><b><template>",
        ] {
            assert_eq!(parse(&piece.repeat(10_000)).err(), Some(ExtractError::TooDeep), "{piece}");
        }
        let unclosed: String = (0..5000).map(|i| format!("<div><font id={i}>x</div>")).collect();
        // Opened anew they nest, or stand side by side where something closes them.
        assert_eq!(parse(&unclosed).err(), Some(ExtractError::TooDeep));
        let flat: String = (0..200).map(|i| format!("<div><font id={i}>x</div>")).collect();
        assert_eq!(parse(&(flat + &"<p>x</p>".repeat(5000))).err(), Some(ExtractError::TooManyElements));
        let attributes: String = (0..2000).map(|i| format!(" a{i}")).collect();
        assert_eq!(
            parse(&(format!("<div><b{attributes}></div>") + &"<p>x".repeat(50_000))).err(),
            Some(ExtractError::TooManyAttributes)
        );
        let repeated: String = (0..100_000).map(|i| format!("<html a{i}>")).collect();
        assert!(parse(&repeated).is_ok());
    }

    #[test]
    fn what_adoptions_make_deeper_is_noticed() {
        let html = "<h1><nobr></p></p><font>".repeat(127);
        assert_eq!(parse(&html).err(), Some(ExtractError::TooDeep));
        for depth in [MAX_HTML_DEPTH, MAX_HTML_DEPTH + 1] {
            let document = Document::from("<i>".repeat(depth - 2) + "x");
            assert_eq!(is_deeper(&document, MAX_HTML_DEPTH), depth > MAX_HTML_DEPTH);
        }
        assert!(!is_deeper(&Document::from("<p>a<p><b>c</b>d<ul><li>e<li>f</ul>"), 5));
        assert!(is_deeper(&Document::from("<p>a<p><b>c</b>d<ul><li>e<li>f</ul><p><i><b>g"), 4));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn no_tree_is_deeper_than_the_bound(
            pieces in prop::collection::vec(prop::sample::select(vec![
                "<div>", "</div>", "<p>", "</p>", "<b>", "</b>", "<i>", "</i>", "<a>", "</a>", "<font>", "</font>", "<table>",
                "</table>", "<tr>", "<td>", "</td>", "<caption>", "<object>", "</object>", "<svg>", "</svg>", "<desc>", "<math>",
                "</math>", "<mi>", "<template>", "</template>", "<select>", "<option>", "</select>", "<button>", "<li>", "<ul>",
                "</ul>", "<form>", "</form>", "<span>", "</span>", "x", "<frameset>", "<nobr>", "<h1>", "</h1>",
            ]), 1..12),
            times in 1usize..300,
        ) {
            let html = pieces.concat().repeat(times);
            if let Ok(document) = parse(&html) {
                prop_assert!(depth(&document.root()) <= MAX_HTML_DEPTH);
            }
        }
    }
}
