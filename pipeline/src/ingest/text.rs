//! Plain text: one document per file.

use std::borrow::Cow;
use std::io::Read;

use datafusion::error::Result;

use super::bytes::blame;
use super::rows::{Document, Place, Reason, Rows};

const PLACE: Place = Place { unit: "text", number: Some(1), offset: 0 };

/// Read the one text of a file.
pub(super) fn read(input: impl Read, limit: usize, rows: &mut Rows) -> Result<()> {
    let mut bytes = Vec::new();
    let result = input.take((limit as u64).saturating_add(1)).read_to_end(&mut bytes);
    rows.count();
    if let Err(error) = result {
        let (reason, detail) = blame(error)?;
        return rows.quarantine(reason, PLACE, None, &detail, &bytes);
    }
    let text = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&bytes);
    if bytes.is_empty() {
        return rows.quarantine(Reason::EmptyFile, PLACE, None, "the file holds no record", b"");
    }
    if bytes.len() > limit {
        let detail = format!("longer than max_record_bytes, which is {limit}");
        return rows.quarantine(Reason::TooLong, PLACE, None, &detail, text);
    }
    match std::str::from_utf8(text) {
        Ok(text) => rows.keep(PLACE, Document { text: Cow::Borrowed(text), ..Document::default() }),
        Err(e) => {
            let detail = match text {
                [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] => "this is UTF-16; convert it to UTF-8".to_owned(),
                _ => format!("not UTF-8 at byte {}", e.valid_up_to()),
            };
            rows.quarantine(Reason::InvalidUtf8, PLACE, None, &detail, text)
        }
    }
}
