//! Web addresses in running text.

use std::ops::Range;

use memchr::memmem;

use super::{Output, is_protected};

/// Removes addresses with a scheme (`http`, `https`, `ftp`) or that begin with `www.`; targets of Markdown links and
/// reference definitions (`[1]: http…`) stay.
pub(super) fn remove(out: &mut Output<'_>, spans: &[Range<usize>]) {
    let text = out.text();
    let mut span = 0;
    let mut at = 0;
    let mut starts = Starts::new(text);
    while let Some(start) = starts.next(at) {
        let end = start + length(&text[start..]);
        at = end.max(start + 1);
        while !text.is_char_boundary(at) {
            at += 1;
        }
        if end - start < 8 || is_protected(spans, &mut span, start) || text[..start].ends_with("]: ") {
            continue;
        }
        let bytes = text.as_bytes();
        // `<http://…>` goes with its brackets; of the spaces on both sides one stays.
        let autolink = start > 0 && bytes[start - 1] == b'<' && bytes.get(end) == Some(&b'>');
        let (mut from, mut to) = if autolink { (start - 1, end + 1) } else { (start, end) };
        let space_before = from > 0 && bytes[from - 1] == b' ';
        match bytes.get(to) {
            Some(b' ') if space_before || from == 0 || bytes[from - 1] == b'\n' => to += 1,
            None | Some(b'\n') if space_before => from -= 1,
            _ => {}
        }
        out.remove(from..to);
    }
}

/// Finds where addresses begin, at rising places: each of the two marks is looked for once behind its last place.
struct Starts<'t> {
    bytes: &'t [u8],
    scheme: Option<usize>,
    www: Option<usize>,
}

impl<'t> Starts<'t> {
    fn new(text: &'t str) -> Self {
        let bytes = text.as_bytes();
        Self { bytes, scheme: memmem::find(bytes, b"://"), www: memmem::find(bytes, b"www.") }
    }

    /// The first address that begins at `at` or behind it.
    fn next(&mut self, at: usize) -> Option<usize> {
        let find = |from: usize, mark: &[u8]| {
            self.bytes.get(from..).and_then(|rest| memmem::find(rest, mark)).map(|found| from + found)
        };
        loop {
            if self.scheme.is_some_and(|scheme| scheme < at) {
                self.scheme = find(at, b"://");
            }
            if self.www.is_some_and(|www| www < at) {
                self.www = find(at, b"www.");
            }
            match (self.scheme, self.www) {
                (scheme, Some(www)) if scheme.is_none_or(|scheme| www < scheme) => {
                    // `wwww.` begins nothing.
                    if www == 0 || !self.bytes[www - 1].is_ascii_alphanumeric() {
                        return Some(www);
                    }
                    self.www = find(www + 1, b"www.");
                }
                (Some(scheme), _) => {
                    let found = ["https", "http", "ftp"].into_iter().find_map(|name| {
                        let start = scheme.checked_sub(name.len()).filter(|start| *start >= at)?;
                        self.bytes[start..scheme].eq_ignore_ascii_case(name.as_bytes()).then_some(start)
                    });
                    if found.is_some() {
                        return found;
                    }
                    self.scheme = find(scheme + 1, b"://");
                }
                (None, _) => return None,
            }
        }
    }
}

/// Length of an address: up to white space or a character that cannot be in one, without the marks of the sentence
/// behind it and without a bracket that it did not open.
fn length(rest: &str) -> usize {
    let stop = |c: char| {
        c.is_whitespace() || matches!(c, '<' | '>' | '"' | '`' | '\\' | '^' | '{' | '}' | '|') || u32::from(c) >= 0x3000
    };
    let mut url = &rest[..rest.find(stop).unwrap_or(rest.len())];
    while let Some(last) = url.chars().next_back() {
        let cut = match last {
            '.' | ',' | ';' | ':' | '!' | '?' | '\'' | '*' | '_' | '”' | '’' | '»' => true,
            ')' => url.matches(')').count() > url.matches('(').count(),
            ']' => url.matches(']').count() > url.matches('[').count(),
            _ => false,
        };
        if !cut {
            break;
        }
        url = &url[..url.len() - last.len_utf8()];
    }
    url.len()
}
