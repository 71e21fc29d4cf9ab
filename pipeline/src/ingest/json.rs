//! JSON lines: one object per line, of which only the mapped fields are built.

use std::borrow::Cow;
use std::fmt;
use std::io::Read;

use chrono::{DateTime, NaiveDate, NaiveDateTime};
use datafusion::error::Result;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::bytes::blame;
use super::config::FieldMapping;
use super::lines::{Body, Lines};
use super::rows::{Document, Place, Reason, Rows};

/// The part of a file to read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    /// First byte.
    pub start: u64,
    /// Records starting at or after this byte belong to somebody else.
    pub end: u64,
    /// Whether records are known by their byte offset (plain files) or by their number.
    pub by_offset: bool,
}

impl Span {
    /// Where to begin to read: one byte early, to see whether a line starts at `start`.
    pub fn read_from(&self) -> u64 {
        self.start.saturating_sub(1)
    }
}

/// Read the lines of `span`; `input` begins at [`Span::read_from`].
pub(super) fn read(input: impl Read, span: Span, fields: &Fields, limit: usize, rows: &mut Rows) -> Result<()> {
    let mut lines = Lines::new(input, span.read_from(), limit);
    let mut records = 0u64;
    let mut text = String::new();
    let skipped = if span.start == 0 { lines.skip_bom() } else { lines.skip_partial_line(span.end) };
    let mut failed = skipped.err();
    // The first line begins at byte 0, before the byte order mark.
    let mut first = span.start == 0;
    while failed.is_none() && (first || lines.offset() < span.end) {
        first = false;
        let line = match lines.next() {
            Ok(Some(line)) => line,
            Ok(None) => break,
            Err(e) => {
                failed = Some(e);
                break;
            }
        };
        let place = Place {
            unit: "line",
            number: (span.start == 0).then_some(line.index + 1),
            offset: if span.by_offset { line.offset } else { line.index },
        };
        if let Body::Whole(body) = line.body
            && body.trim_ascii().is_empty()
        {
            continue;
        }
        records += 1;
        rows.count();
        match line.body {
            Body::Whole(body) => match fields.parse(body, &mut text) {
                Ok(document) => rows.keep(place, document)?,
                Err(bad) => rows.quarantine(bad.reason, place, None, &bad.detail, body)?,
            },
            Body::TooLong { head, length } => {
                let detail = format!("{length} bytes, max_record_bytes is {limit}");
                rows.quarantine(Reason::TooLong, place, None, &detail, head)?;
            }
        }
    }
    if let Some(error) = failed {
        let (reason, detail) = blame(error)?;
        let index = lines.index();
        let place = Place {
            unit: "line",
            number: Some(index + 1),
            offset: if span.by_offset { lines.offset() } else { index },
        };
        rows.count();
        return rows.quarantine(reason, place, None, &detail, lines.rest());
    }
    if records == 0 && span.start == 0 && lines.offset() < span.end {
        rows.count();
        let place = Place { unit: "line", number: Some(1), offset: 0 };
        return rows.quarantine(Reason::EmptyFile, place, None, "the file holds no record", b"");
    }
    Ok(())
}

/// A record that cannot become a document.
#[derive(Debug)]
pub(super) struct Bad {
    pub reason: Reason,
    pub detail: String,
}

/// The mapped fields of JSON objects.
#[derive(Debug)]
pub(super) struct Fields {
    mapping: FieldMapping,
    root: Node,
    /// Names of the slots, metadata last.
    names: Vec<String>,
}

const TEXT: usize = 0;
const URL: usize = 1;
const LANGUAGE: usize = 2;
const TIMESTAMP: usize = 3;
const METADATA: usize = 4;

/// One level of the wanted paths.
#[derive(Debug, Default)]
struct Node {
    slots: Vec<usize>,
    children: Vec<(String, Node)>,
}

impl Node {
    fn insert(&mut self, path: &str, slot: usize) {
        self.child(path).slots.push(slot);
        // `a.b` is a field of that name, or field `b` of the object `a`.
        if let Some((head, tail)) = path.split_once('.') {
            self.child(head).insert(tail, slot);
        }
    }

    fn child(&mut self, name: &str) -> &mut Node {
        let at = self.children.iter().position(|(n, _)| n == name).unwrap_or_else(|| {
            self.children.push((name.to_owned(), Node::default()));
            self.children.len() - 1
        });
        &mut self.children[at].1
    }

    fn find(&self, name: &str) -> Option<&Node> {
        self.children.iter().find(|(n, _)| n == name).map(|(_, node)| node)
    }

    /// Fill the slots at and below this node from a value that had to be built anyway.
    fn fill(&self, value: Value, slots: &mut [Option<Value>]) {
        if let Value::Object(map) = &value {
            for (name, node) in &self.children {
                if let Some(inner) = map.get(name) {
                    node.fill(inner.clone(), slots);
                }
            }
        }
        if let Some((last, others)) = self.slots.split_last() {
            for slot in others {
                slots[*slot] = Some(value.clone());
            }
            slots[*last] = Some(value);
        }
    }
}

impl Fields {
    pub fn new(mapping: &FieldMapping) -> Self {
        let mut names =
            vec![mapping.text.clone(), mapping.url.clone(), mapping.language.clone(), mapping.timestamp.clone()];
        names.extend(mapping.id.clone());
        names.extend(mapping.metadata.iter().cloned());
        let mut root = Node::default();
        for (slot, name) in names.iter().enumerate() {
            root.insert(name, slot);
        }
        Self { mapping: mapping.clone(), root, names }
    }

    /// The document of one line, whose text is put into `text` in the place of what is there.
    pub fn parse<'t>(&self, line: &[u8], text: &'t mut String) -> Result<Document<'t>, Bad> {
        /// Bytes of memory that are kept for the next text; a longer one gives its memory back.
        const KEEP: usize = 1 << 20;
        text.clear();
        text.shrink_to(KEEP);
        let line = std::str::from_utf8(line).map_err(|e| Bad {
            reason: Reason::InvalidUtf8,
            detail: format!("not UTF-8 at byte {} of the line", e.valid_up_to()),
        })?;
        let mut found = Found { text, is_string: false, slots: vec![None; self.names.len()] };
        let mut json = serde_json::Deserializer::from_str(line);
        Wanted { node: &self.root, found: &mut found, top: true }
            .deserialize(&mut json)
            .and_then(|()| json.end())
            .map_err(|e| Bad { reason: Reason::InvalidJson, detail: e.to_string() })?;
        let Found { text, is_string, mut slots } = found;
        let text = match slots[TEXT].take() {
            _ if is_string => Cow::Borrowed(text.as_str()),
            Some(Value::String(text)) => Cow::Owned(text),
            None => return Err(Bad { reason: Reason::MissingText, detail: self.explain_missing(line) }),
            Some(Value::Null) => {
                let detail = format!("field {:?} is null", self.mapping.text);
                return Err(Bad { reason: Reason::MissingText, detail });
            }
            Some(other) => {
                let detail = format!("field {:?} is {}, not a string", self.mapping.text, kind(&other));
                return Err(Bad { reason: Reason::WrongType, detail });
            }
        };
        let mut metadata = Map::new();
        let timestamp = match slots[TIMESTAMP].take() {
            None | Some(Value::Null) => None,
            Some(value) => {
                let time = match &value {
                    Value::String(text) => parse_time(text),
                    Value::Number(number) => number.as_f64().and_then(unix_time),
                    _ => None,
                };
                if time.is_none() {
                    metadata.insert(self.mapping.timestamp.clone(), value);
                }
                time
            }
        };
        let url = slots[URL].take().and_then(plain);
        let language = slots[LANGUAGE].take().and_then(plain);
        for (slot, name) in slots[METADATA..].iter_mut().zip(&self.names[METADATA..]) {
            if let Some(value) = slot.take().filter(|v| !v.is_null()) {
                metadata.insert(name.clone(), value);
            }
        }
        if let Some(id) = self.mapping.id.as_ref().and_then(|id| metadata.shift_remove(id)) {
            metadata.shift_insert(0, "id".into(), id);
        }
        Ok(Document {
            text,
            url: url.map(Cow::Owned),
            language: language.map(Cow::Owned),
            timestamp,
            metadata: (!metadata.is_empty()).then(|| Value::Object(metadata).to_string()),
        })
    }

    fn explain_missing(&self, line: &str) -> String {
        let names: Vec<String> = serde_json::from_str::<Map<String, Value>>(line)
            .map(|map| map.into_iter().map(|(name, _)| name).take(20).collect())
            .unwrap_or_default();
        missing_field(&self.mapping.text, &names)
    }
}

/// Says that the text field is missing, what there is instead, and what to do.
pub(super) fn missing_field(text: &str, there: &[String]) -> String {
    if there.is_empty() {
        return format!("no field {text:?}, nor any other");
    }
    let guess = ["text", "content", "body", "raw_content", "document", "markdown", "page_content", "html"]
        .iter()
        .find_map(|usual| there.iter().find(|name| name.eq_ignore_ascii_case(usual)))
        .map_or(String::new(), |name| format!(" (is it {name:?}?)"));
    format!("no field {text:?} among {}{guess}; set fields.text of the input", there.join(", "))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// A string as it is, anything else as JSON.
fn plain(value: Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text),
        other => Some(other.to_string()),
    }
}

/// Milliseconds since 1970 of the ways in which corpora write times.
pub(super) fn parse_time(text: &str) -> Option<i64> {
    let text = text.trim();
    if let Ok(time) = DateTime::parse_from_rfc3339(text).or_else(|_| DateTime::parse_from_rfc2822(text)) {
        return Some(time.timestamp_millis());
    }
    let naive = ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f", "%Y%m%d%H%M%S"]
        .iter()
        .find_map(|format| NaiveDateTime::parse_from_str(text, format).ok())
        .or_else(|| NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()?.and_hms_opt(0, 0, 0));
    match naive {
        Some(time) => Some(time.and_utc().timestamp_millis()),
        None => text.parse().ok().and_then(unix_time),
    }
}

/// Milliseconds since 1970 of a Unix time in seconds or, from the year 5138 on, in milliseconds.
pub(super) fn unix_time(time: f64) -> Option<i64> {
    let millis = if time.abs() < 1e11 { time * 1000.0 } else { time };
    (millis.is_finite() && millis.abs() < 1e15).then_some(millis as i64)
}

/// What was found of a line.
struct Found<'t> {
    /// The text, if `is_string`: it is most of a line and goes from here to the rows, so it is no value of its own.
    text: &'t mut String,
    /// Whether the last field that is the text is a string; else it is in its slot.
    is_string: bool,
    /// The other fields, and the text where it is something else or wanted in other slots too.
    slots: Vec<Option<Value>>,
}

/// Builds the wanted fields of an object and reads past the others.
struct Wanted<'a, 't> {
    node: &'a Node,
    found: &'a mut Found<'t>,
    top: bool,
}

impl<'de> DeserializeSeed<'de> for Wanted<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        let Node { slots, children } = self.node;
        if slots.is_empty() {
            return if self.top { deserializer.deserialize_map(self) } else { deserializer.deserialize_any(self) };
        }
        if *slots == [TEXT] && children.is_empty() {
            return deserializer.deserialize_any(Text(self.found));
        }
        let value = <Value as serde::Deserialize>::deserialize(deserializer)?;
        self.node.fill(value, &mut self.found.slots);
        self.found.is_string &= self.found.slots[TEXT].is_none();
        Ok(())
    }
}

/// Takes a string as the text, and anything else as a value of its slot.
struct Text<'a, 't>(&'a mut Found<'t>);

impl Text<'_, '_> {
    fn other(self, value: Value) {
        self.0.is_string = false;
        self.0.slots[TEXT] = Some(value);
    }
}

impl<'de> Visitor<'de> for Text<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text")
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.0.text.clear();
        self.0.text.push_str(text);
        self.0.is_string = true;
        self.0.slots[TEXT] = None;
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        self.other(serde::Deserialize::deserialize(MapAccessDeserializer::new(map))?);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<(), A::Error> {
        self.other(serde::Deserialize::deserialize(SeqAccessDeserializer::new(seq))?);
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        self.other(Value::Null);
        Ok(())
    }

    fn visit_bool<E>(self, value: bool) -> Result<(), E> {
        self.other(value.into());
        Ok(())
    }

    fn visit_i64<E>(self, value: i64) -> Result<(), E> {
        self.other(value.into());
        Ok(())
    }

    fn visit_u64<E>(self, value: u64) -> Result<(), E> {
        self.other(value.into());
        Ok(())
    }

    fn visit_f64<E>(self, value: f64) -> Result<(), E> {
        self.other(value.into());
        Ok(())
    }
}

/// Looks a key up without building it.
struct Key<'a>(&'a Node);

impl<'de, 'a> DeserializeSeed<'de> for Key<'a> {
    type Value = Option<&'a Node>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'a> Visitor<'_> for Key<'a> {
    type Value = Option<&'a Node>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
        Ok(self.0.find(name))
    }
}

impl<'de> Visitor<'de> for Wanted<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(wanted) = map.next_key_seed(Key(self.node))? {
            match wanted {
                Some(node) => map.next_value_seed(Wanted { node, found: self.found, top: false })?,
                None => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }
}
