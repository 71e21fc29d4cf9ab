//! Strings that no reader wrote and none wants to read.

use std::ops::Range;

use super::{Output, is_protected};

/// A longer word is abnormal (characters).
const MAX_WORD: usize = 200;
/// A blob of an encoding (base64, hexadecimal) has at least so many characters.
const MIN_BLOB: usize = 64;
/// A line of symbols alone is abnormal from so many on, unless it is a rule or a table of Markdown.
const MIN_SYMBOLS: usize = 8;

/// Removes words of more than [`MAX_WORD`] characters without a letter beyond ASCII (scripts without spaces have long
/// runs), blobs of base64 and hexadecimal digits, and lines of symbols alone. A line that held nothing else goes
/// with its newline.
pub(super) fn strings(out: &mut Output<'_>, spans: &[Range<usize>]) {
    let text = out.text();
    let mut span = 0;
    let mut line_start = 0;
    for line in text.split_inclusive('\n') {
        let content = line.trim();
        if !content.is_empty() && !is_protected(spans, &mut span, line_start) {
            if is_symbols(content) {
                out.remove(line_start..line_start + line.len());
            } else if content.len() >= MIN_BLOB {
                words(out, line, line_start, spans);
            }
        }
        line_start += line.len();
    }
}

fn words(out: &mut Output<'_>, line: &str, line_start: usize, spans: &[Range<usize>]) {
    let mut span = spans.partition_point(|span| span.end <= line_start);
    let bytes = line.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        // Words of fewer bytes are none of these: white space is looked for from where the shortest blob would end, and
        // what it ends is not looked at.
        let reach = &bytes[at..bytes.len().min(at + MIN_BLOB)];
        if let Some(last) = reach.iter().rposition(u8::is_ascii_whitespace) {
            at += last + 1;
            continue;
        }
        let length = bytes[at..].iter().position(u8::is_ascii_whitespace).unwrap_or(bytes.len() - at);
        let word = &line[at..at + length];
        let start = line_start + at;
        if (word.len() > MAX_WORD && word.is_ascii() || is_blob(word)) && !is_protected(spans, &mut span, start) {
            // The white space behind it goes too, so that what stood on both sides is parted once.
            let behind = usize::from(bytes.get(at + length).is_some_and(|b| *b == b' '));
            out.remove(start..start + length + behind);
        }
        at += length + 1;
    }
}

/// Whether a word is long, of the alphabet of base64 alone, and mixes letters and digits as no word does.
fn is_blob(word: &str) -> bool {
    let core = word.trim_end_matches(['=', ',', ';', '.', '"', '\'', ')']);
    if core.len() < MIN_BLOB
        || !core.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/' | b'-' | b'_'))
    {
        return false;
    }
    let changes = core.as_bytes().windows(2).filter(|w| class(w[0]) != class(w[1])).count();
    // Prose and identifiers change between kinds of characters once in a word or so, blobs every few characters.
    changes * 5 >= core.len() && core.bytes().any(|b| b.is_ascii_digit())
}

fn class(byte: u8) -> u8 {
    match byte {
        b'a'..=b'z' => 0,
        b'A'..=b'Z' => 1,
        b'0'..=b'9' => 2,
        _ => 3,
    }
}

fn is_symbols(line: &str) -> bool {
    let mut count = 0;
    for character in line.chars() {
        if character.is_alphanumeric() {
            return false;
        }
        count += usize::from(!character.is_whitespace());
    }
    if count < MIN_SYMBOLS {
        return false;
    }
    // Rules and headings (`---`, `===`, `***`, `~~~`) and separators of tables (`|---|:-:|`) are Markdown.
    let mut marks = line.chars().filter(|c| !c.is_whitespace());
    let first = marks.next();
    let one_mark = matches!(first, Some('-' | '=' | '*' | '_' | '~' | '#' | '`')) && marks.all(|c| Some(c) == first);
    let table =
        line.contains('|') && line.contains('-') && line.chars().all(|c| matches!(c, '|' | '-' | ':' | ' ' | '+'));
    !one_mark && !table
}
