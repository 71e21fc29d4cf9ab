//! HTTP responses as crawlers store them: head, transfer and content encodings.

use std::borrow::Cow;
use std::io::Read;

/// A parsed response.
#[derive(Debug)]
pub(super) struct Response<'a> {
    pub status: u16,
    pub headers: Headers,
    /// As stored: still encoded.
    pub body: &'a [u8],
}

/// Header fields in order; names compare without case.
#[derive(Debug, Default)]
pub(super) struct Headers(Vec<(String, String)>);

impl Headers {
    /// Parse `Name: value` lines; a line that begins with white space continues the one before.
    pub fn parse(head: &[u8]) -> Self {
        let mut fields: Vec<(String, String)> = Vec::new();
        for line in head.split(|b| *b == b'\n') {
            let text = String::from_utf8_lossy(line);
            if text.starts_with([' ', '\t']) {
                if let Some((_, value)) = fields.last_mut() {
                    value.push(' ');
                    value.push_str(text.trim());
                }
            } else if let Some((name, value)) = text.split_once(':') {
                fields.push((name.trim().to_owned(), value.trim().to_owned()));
            }
        }
        Self(fields)
    }

    /// Value of the first field called `name`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

/// Length of a head with the empty line that ends it, and of the head alone.
pub(super) fn head_end(bytes: &[u8]) -> Option<(usize, usize)> {
    memchr::memchr_iter(b'\n', bytes).find_map(|at| match &bytes[at + 1..] {
        [b'\n', ..] => Some((at + 2, at + 1)),
        [b'\r', b'\n', ..] => Some((at + 3, at + 1)),
        _ => None,
    })
}

/// Parse the block of a WARC response.
pub(super) fn parse(block: &[u8]) -> Result<Response<'_>, String> {
    let (body, head) = head_end(block).unwrap_or((block.len(), block.len()));
    let line_end = memchr::memchr(b'\n', &block[..head]).unwrap_or(head);
    let line = String::from_utf8_lossy(&block[..line_end]);
    let status = line
        .strip_prefix("HTTP/")
        .and_then(|rest| rest.split_ascii_whitespace().nth(1))
        .and_then(|code| code.parse().ok())
        .ok_or_else(|| format!("no HTTP status line: {:?}", line.chars().take(80).collect::<String>()))?;
    Ok(Response { status, headers: Headers::parse(&block[line_end..head]), body: &block[body..] })
}

/// Why a body cannot be decoded.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum BodyError {
    /// It is longer than the limit.
    TooLong,
    /// The encoding is not one that we know.
    UnknownEncoding(String),
    /// It does not decode.
    Corrupt(String),
}

impl Response<'_> {
    /// The body with its transfer and content encodings undone, of at most `limit` bytes.
    ///
    /// Crawlers often undo an encoding and leave the header, so a body that does not begin as the
    /// header says is taken as it is.
    pub fn decoded_body(&self, limit: usize) -> Result<Cow<'_, [u8]>, BodyError> {
        let mut body = Cow::Borrowed(self.body);
        let chunked = self.headers.get("transfer-encoding").is_some_and(|e| e.to_ascii_lowercase().contains("chunked"));
        if chunked && let Some(joined) = join_chunks(self.body) {
            body = Cow::Owned(joined);
        }
        // The last encoding named was applied last.
        let encodings = self.headers.get("content-encoding").unwrap_or("").to_ascii_lowercase();
        for encoding in encodings.split(',').rev().map(str::trim) {
            let decoded = match encoding {
                "" | "identity" | "none" | "utf-8" => continue,
                "gzip" | "x-gzip" if body.starts_with(&[0x1f, 0x8b]) => {
                    unpack(flate2::read::MultiGzDecoder::new(&body[..]), limit)
                }
                "deflate" if body.first().is_some_and(|b| b & 0x0f == 8) => {
                    unpack(flate2::read::ZlibDecoder::new(&body[..]), limit)
                        .or_else(|_| unpack(flate2::read::DeflateDecoder::new(&body[..]), limit))
                }
                "deflate" => match unpack(flate2::read::DeflateDecoder::new(&body[..]), limit) {
                    Err(BodyError::Corrupt(_)) => continue,
                    other => other,
                },
                "zstd" if body.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) => {
                    let decoder = zstd::stream::read::Decoder::with_buffer(&body[..])
                        .map_err(|e| BodyError::Corrupt(e.to_string()))?;
                    unpack(decoder, limit)
                }
                "gzip" | "x-gzip" | "zstd" => continue,
                other => return Err(BodyError::UnknownEncoding(other.to_owned())),
            };
            body = Cow::Owned(decoded?);
        }
        if body.len() > limit { Err(BodyError::TooLong) } else { Ok(body) }
    }
}

fn unpack(mut input: impl Read, limit: usize) -> Result<Vec<u8>, BodyError> {
    let mut bytes = Vec::new();
    let result = input.by_ref().take((limit as u64).saturating_add(1)).read_to_end(&mut bytes);
    if bytes.len() > limit {
        return Err(BodyError::TooLong);
    }
    match result {
        Ok(_) => Ok(bytes),
        // A crawler that cut the page off leaves a beginning that is still a page.
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof && !bytes.is_empty() => Ok(bytes),
        Err(e) => Err(BodyError::Corrupt(e.to_string())),
    }
}

/// Join the chunks of a chunked body; `None` if it is not chunked. A missing end is forgiven.
fn join_chunks(mut body: &[u8]) -> Option<Vec<u8>> {
    let mut joined = Vec::with_capacity(body.len());
    let mut chunks = 0;
    loop {
        let line_end = memchr::memchr(b'\n', &body[..body.len().min(1024)]);
        let line = &body[..line_end.unwrap_or(0)];
        let digits = line.split(|b| *b == b';').next().unwrap_or(line).trim_ascii();
        let size = std::str::from_utf8(digits).ok().and_then(|d| usize::from_str_radix(d, 16).ok());
        let (Some(line_end), Some(size)) = (line_end, size) else {
            return (chunks > 0).then_some(joined);
        };
        if size == 0 {
            return Some(joined);
        }
        let rest = &body[line_end + 1..];
        let chunk = &rest[..size.min(rest.len())];
        joined.extend_from_slice(chunk);
        chunks += 1;
        let rest = &rest[chunk.len()..];
        body = rest.strip_prefix(b"\r\n").or_else(|| rest.strip_prefix(b"\n")).unwrap_or(rest);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn heads_with_either_line_end_and_folded_fields() {
        let response = parse(b"HTTP/1.1 200 OK\r\nContent-Type: text/html;\r\n charset=x\r\nA:b\r\n\r\nbody").unwrap();
        assert_eq!(response.status, 200);
        assert_eq!(response.headers.get("content-type"), Some("text/html; charset=x"));
        assert_eq!(response.headers.get("a"), Some("b"));
        assert_eq!(response.body, b"body");
        assert_eq!(parse(b"HTTP/1.0 404\nA: b\n\nbody").unwrap().body, b"body");
        assert!(parse(b"<html>").unwrap_err().contains("<html>"));
    }

    #[test]
    fn chunks_are_joined_and_what_is_not_chunked_is_left() {
        assert_eq!(join_chunks(b"4\r\nWiki\r\n5;x=y\r\npedia\r\n0\r\n\r\n").unwrap(), b"Wikipedia");
        assert_eq!(join_chunks(b"4\r\nWiki\r\nff\r\npe").unwrap(), b"Wikipe");
        assert_eq!(join_chunks(b"<html>face</html>\n"), None);
    }

    #[test]
    fn a_bomb_is_stopped_at_the_limit() {
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        std::io::copy(&mut std::io::repeat(b'a').take(50 << 20), &mut gz).unwrap();
        let mut block = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n".to_vec();
        block.extend(gz.finish().unwrap());
        assert_eq!(parse(&block).unwrap().decoded_body(1 << 20), Err(BodyError::TooLong));
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut block = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Encoding: deflate, gzip\r\n\r\n".to_vec();
            block.extend(&bytes);
            let _ = parse(&block).unwrap().decoded_body(1000);
            let _ = parse(&bytes);
        }
    }
}
