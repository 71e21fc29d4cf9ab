//! Bytes of a page to text.

use std::borrow::Cow;

use encoding_rs::{Encoding, UTF_8, WINDOWS_1252};

/// How far into a page a declaration of its encoding is looked for.
const PRESCAN_BYTES: usize = 4096;

/// Decode a page. In this order: a byte order mark; UTF-8 if the bytes are valid UTF-8 beyond ASCII,
/// which text in another encoding practically never is; the charset of the HTTP header; the one that
/// the page declares; UTF-8; windows-1252. A page that claims UTF-8 and has more broken sequences than
/// whole ones is read as windows-1252.
pub(super) fn decode<'a>(bytes: &'a [u8], http_charset: Option<&str>) -> Cow<'a, str> {
    if let Some((encoding, length)) = Encoding::for_bom(bytes) {
        return encoding.decode_without_bom_handling(&bytes[length..]).0;
    }
    let declared = http_charset
        .and_then(|label| Encoding::for_label(label.trim_matches(['"', '\'', ' ']).as_bytes()))
        .or_else(|| declared_encoding(bytes));
    let utf8 = std::str::from_utf8(bytes);
    match (utf8, declared) {
        (Ok(text), None) => Cow::Borrowed(text),
        (Ok(text), Some(encoding)) if encoding == UTF_8 || !text.is_ascii() => Cow::Borrowed(text),
        (_, Some(encoding)) if encoding != UTF_8 => encoding.decode_without_bom_handling(bytes).0,
        (Ok(text), _) => Cow::Borrowed(text),
        (Err(_), Some(_)) if mostly_utf8(bytes) => String::from_utf8_lossy(bytes),
        (Err(_), _) => WINDOWS_1252.decode_without_bom_handling(bytes).0,
    }
}

/// Whether most of what is beyond ASCII is whole UTF-8 sequences.
fn mostly_utf8(bytes: &[u8]) -> bool {
    let (mut whole, mut broken) = (0usize, 0usize);
    for chunk in bytes.utf8_chunks() {
        whole += chunk.valid().chars().filter(|c| !c.is_ascii()).count();
        broken += usize::from(!chunk.invalid().is_empty());
    }
    whole >= broken
}

/// The encoding in `<meta charset=…>`, `<meta … content="…; charset=…">` or an XML declaration.
fn declared_encoding(bytes: &[u8]) -> Option<&'static Encoding> {
    let head = bytes[..bytes.len().min(PRESCAN_BYTES)].to_ascii_lowercase();
    let from_meta = memchr::memmem::find_iter(&head, b"charset").find_map(|at| label(&head[at + 7..]));
    let xml = || {
        let declaration = head.trim_ascii_start().strip_prefix(b"<?xml")?;
        let end = memchr::memchr(b'>', declaration)?;
        let at = memchr::memmem::find(&declaration[..end], b"encoding")?;
        label(&declaration[at + 8..end])
    };
    match from_meta.or_else(xml)? {
        // A page whose meta element could be read is not UTF-16, whatever it says.
        found if found.output_encoding() != found => Some(UTF_8),
        found => Some(found),
    }
}

/// The encoding in ` = "label"`.
fn label(rest: &[u8]) -> Option<&'static Encoding> {
    let value = rest.trim_ascii_start().strip_prefix(b"=")?.trim_ascii_start();
    let value = value.strip_prefix(b"\"").or_else(|| value.strip_prefix(b"'")).unwrap_or(value);
    let end = value.iter().position(|b| b"\"' ;>/\r\n\t?".contains(b)).unwrap_or(value.len());
    Encoding::for_label(&value[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_right_encoding_is_found() {
        let latin = b"caf\xe9 \x96 na\xefve";
        assert_eq!(decode("café".as_bytes(), Some("iso-8859-1")), "café", "valid UTF-8 beats a wrong header");
        assert_eq!(decode(latin, None), "café – naïve");
        assert_eq!(decode(latin, Some("utf-8")), "café – naïve", "a wrong header");
        assert_eq!(decode(b"\xEF\xBB\xBFa\xc3\xa9", Some("iso-8859-1")), "aé");
        assert_eq!(decode(b"\xff\xfea\0b\0", None), "ab");
        assert_eq!(decode(b"<meta charset='Shift_JIS'>\x83\x65", None), "<meta charset='Shift_JIS'>テ");
        assert_eq!(decode(b"\x83\x65", Some("\"shift_jis\"")), "テ");
        assert_eq!(
            decode(b"<meta http-equiv=x content=\"text/html; charset=koi8-r\">\xd4", None),
            "<meta http-equiv=x content=\"text/html; charset=koi8-r\">т"
        );
        assert_eq!(
            decode(b"<?xml version='1.0' encoding='windows-1251'?>\xe4", None),
            "<?xml version='1.0' encoding='windows-1251'?>д"
        );
        assert_eq!(decode(b"\x1b$B%F\x1b(B", Some("iso-2022-jp")), "テ", "ASCII bytes, yet not ASCII");
        assert_eq!(decode("aé\u{fffd}ü".as_bytes(), None), "aé\u{fffd}ü");
        assert_eq!(decode(b"\xc3\xa9\xc3\xa9\xff", Some("utf-8")), "éé\u{fffd}", "one broken byte");
        assert_eq!(decode(b"<meta charset=utf-16>caf\xe9", None), "<meta charset=utf-16>café");
    }
}
