//! Bytes of a page to text.

use std::borrow::Cow;

use encoding_rs::{Encoding, UTF_8};

/// How far into a page a declaration of its encoding is looked for.
const PRESCAN_BYTES: usize = 4096;
/// How much of a page without a declaration is looked at.
const DETECT_BYTES: usize = 256 << 10;

/// Decode a page. In this order: a byte order mark; UTF-8 if the bytes are valid UTF-8 beyond ASCII,
/// which text in another encoding practically never is; the charset of the HTTP header; the one that
/// the page declares; UTF-8; what the bytes look like to Firefox's detector. A page that claims UTF-8 and has more
/// broken sequences than whole ones is judged by its bytes too.
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
        (Err(_), _) => detected(bytes).decode_without_bom_handling(bytes).0,
    }
}

/// The legacy encoding that the bytes look like. The beginning tells it, and the detector is linear but not fast.
fn detected(bytes: &[u8]) -> &'static Encoding {
    let mut detector = chardetng::EncodingDetector::new();
    detector.feed(&bytes[..bytes.len().min(DETECT_BYTES)], true);
    detector.guess(None, false)
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
    fn what_nobody_declares_is_told_from_the_bytes() {
        for (encoding, text) in [
            (encoding_rs::WINDOWS_1251, "Все люди рождаются свободными и равными в своем достоинстве и правах."),
            (
                encoding_rs::SHIFT_JIS,
                "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。",
            ),
            (encoding_rs::EUC_KR, "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다."),
            (
                encoding_rs::GBK,
                "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
            ),
            (
                encoding_rs::BIG5,
                "人人生而自由，在尊嚴和權利上一律平等。他們賦有理性和良心，並應以兄弟關係的精神相對待。",
            ),
            (
                encoding_rs::WINDOWS_1253,
                "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
            ),
            (
                encoding_rs::ISO_8859_2,
                "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.",
            ),
        ] {
            let page = format!("<html><body><p>{text}</p></body></html>");
            let (bytes, _, unmappable) = encoding.encode(&page);
            assert!(!unmappable);
            assert_eq!(decode(&bytes, None), page, "{}", encoding.name());
        }
    }

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
