//! The readers against good, bad and arbitrary bytes.

use std::io::{Cursor, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use arrow::array::{Array, ArrayRef, AsArray, Int64Array, RecordBatch, StringArray, StructArray};
use arrow::datatypes::{DataType, Field, Fields as ArrowFields, Schema, TimestampMillisecondType, UInt64Type};
use datafusion::prelude::SessionContext;
use futures::StreamExt;
use object_store::ObjectStoreExt;
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use proptest::prelude::*;

use super::bad::BadRecords;
use super::bytes::decompress;
use super::config::FieldMapping;
use super::json::{self, Fields, Span};
use super::listing::{Compression, FileFormat, InputFile};
use super::parquet::ParquetFile;
use super::rows::Rows;
use super::scan::{RawTable, ScanContext};
use super::splits::{self, Split};
use super::{text, warc};

const LIMIT: usize = 1 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Default)]
struct Row {
    id: Vec<u8>,
    text: String,
    url: Option<String>,
    language: Option<String>,
    timestamp: Option<i64>,
    metadata: Option<String>,
    rule: Option<String>,
    record: Option<String>,
    offset: u64,
    detail: Option<String>,
    excerpt: Option<String>,
}

fn rows_of(batch: &RecordBatch) -> Vec<Row> {
    let string = |name: &str, row: usize| {
        let column = batch.column_by_name(name).unwrap().as_string_view();
        column.is_valid(row).then(|| column.value(row).to_owned())
    };
    let times = batch.column_by_name("timestamp").unwrap().as_primitive::<TimestampMillisecondType>();
    (0..batch.num_rows())
        .map(|row| Row {
            id: batch.column_by_name("id").unwrap().as_fixed_size_binary().value(row).to_vec(),
            text: string("text", row).unwrap(),
            url: string("url", row),
            language: string("language", row),
            timestamp: times.is_valid(row).then(|| times.value(row)),
            metadata: string("metadata", row),
            rule: string("rule", row),
            record: string("record", row),
            offset: batch.column_by_name("offset").unwrap().as_primitive::<UInt64Type>().value(row),
            detail: string("detail", row),
            excerpt: string("excerpt", row),
        })
        .collect()
}

/// Run a reader and check that it accounts for every record.
fn collect(read: impl FnOnce(&mut Rows) -> datafusion::error::Result<()>) -> Vec<Row> {
    let batches = Arc::new(Mutex::new(Vec::new()));
    let (sink, counter) = (batches.clone(), Arc::new(AtomicU64::new(0)));
    let send = move |batch: RecordBatch| {
        sink.lock().unwrap().push(batch);
        Ok(())
    };
    let mut rows =
        Rows::new("dir/file".into(), "source".into(), counter.clone(), BadRecords::new(1000).task(), Box::new(send));
    read(&mut rows).unwrap();
    rows.flush().unwrap();
    let found: Vec<Row> = batches.lock().unwrap().iter().flat_map(rows_of).collect();
    assert_eq!(found.len() as u64, counter.load(Ordering::SeqCst), "{found:?}");
    let mut ids: Vec<_> = found.iter().map(|row| row.id.clone()).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), found.len(), "ids are unique: {found:?}");
    found
}

const WHOLE: Span = Span { start: 0, end: u64::MAX, by_offset: true };

fn read_json_span(bytes: &[u8], span: Span, limit: usize) -> Vec<Row> {
    let from = usize::try_from(span.read_from()).unwrap();
    collect(|rows| json::read(&bytes[from..], span, &Fields::new(&FieldMapping::default()), limit, rows))
}

fn read_bytes(format: FileFormat, compression: Compression, bytes: &[u8], limit: usize) -> Vec<Row> {
    let input = Cursor::new(bytes.to_vec());
    let span = Span { by_offset: compression == Compression::None, ..WHOLE };
    let fields = FieldMapping::default();
    collect(|rows| match format {
        FileFormat::Jsonl => json::read(decompress(input, compression)?, span, &Fields::new(&fields), limit, rows),
        FileFormat::Text => text::read(decompress(input, compression)?, limit, rows),
        FileFormat::Warc => warc::read(input, compression, bytes.len() as u64, &fields, limit, rows),
        FileFormat::Parquet => {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            super::parquet::read(&ParquetFile::Local(file), span, &fields, limit, rows)
        }
    })
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn texts(rows: &[Row]) -> Vec<&str> {
    rows.iter().filter(|row| row.rule.is_none()).map(|row| row.text.as_str()).collect()
}

fn rules(rows: &[Row]) -> Vec<&str> {
    rows.iter().filter_map(|row| row.rule.as_deref()).collect()
}

// ---- JSON lines

#[test]
fn bad_lines_are_quarantined_with_place_and_reason_and_good_ones_kept() {
    let file = b"\xEF\xBB\xBF{\"text\":\"one\"}\r\n\n{\"text\": \n{\"body\":\"b\",\"x\":1}\n{\"text\":5}\n\
        {\"text\":\"\xff\"}\n{\"text\":\" \"}\n[1]\n{\"text\":\"two\"}";
    let rows = read_json_span(file, WHOLE, LIMIT);
    assert_eq!(texts(&rows), ["one", "two"]);
    let bad = ["invalid_json", "missing_text", "wrong_type", "invalid_utf8", "empty_text", "invalid_json"];
    assert_eq!(rules(&rows), bad);
    let missing = rows.iter().find(|row| row.rule.as_deref() == Some("missing_text")).unwrap();
    assert_eq!(missing.record.as_deref(), Some("line 4"));
    assert_eq!(missing.excerpt.as_deref(), Some("{\"body\":\"b\",\"x\":1}"));
    let detail = missing.detail.as_deref().unwrap();
    assert!(detail.contains("no field \"text\" among body, x (is it \"body\"?)"), "{detail}");
    assert_eq!(file[usize::try_from(missing.offset).unwrap()..][..7], *b"{\"body\"");
}

#[test]
fn overlong_lines_and_empty_files_are_quarantined() {
    let line = format!("{{\"text\":\"{}\"}}\n{{\"text\":\"ok\"}}\n", "x".repeat(5000));
    let rows = read_json_span(line.as_bytes(), WHOLE, 100);
    assert_eq!((texts(&rows), rules(&rows)), (vec!["ok"], vec!["too_long"]));
    assert_eq!(rows[0].detail.as_deref(), Some("5011 bytes, max_record_bytes is 100"));
    assert_eq!(rows[0].excerpt.as_ref().unwrap().len(), 1024);
    for empty in [&b""[..], b"\n \r\n", b"\xEF\xBB\xBF"] {
        assert_eq!(rules(&read_json_span(empty, WHOLE, 100)), ["empty_file"]);
    }
}

#[test]
fn fields_are_mapped_from_nested_objects_of_any_type() {
    let mapping = FieldMapping {
        text: "doc.body".into(),
        id: Some("key".into()),
        url: "meta.url".into(),
        language: "lang".into(),
        timestamp: "when".into(),
        metadata: vec!["meta".into(), "score".into(), "a.b".into(), "absent".into()],
    };
    let fields = Fields::new(&mapping);
    let mut text = String::new();
    let document = fields
        .parse(
            br#"{"key":7,"junk":[{"text":1}],"doc":{"title":"t","body":"a\u00e9\nb"},"meta":{"url":"http://x","n":[1,2]},
            "lang":["en"],"when":"2020-02-03T04:05:06+01:00","score":0.5,"a.b":"literal"}"#,
            &mut text,
        )
        .unwrap();
    assert_eq!(document.text, "aé\nb");
    assert_eq!(document.url.as_deref(), Some("http://x"));
    assert_eq!(document.language.as_deref(), Some("[\"en\"]"));
    assert_eq!(document.timestamp, Some(1_580_699_106_000));
    assert_eq!(
        document.metadata.as_deref(),
        Some(r#"{"id":7,"meta":{"url":"http://x","n":[1,2]},"score":0.5,"a.b":"literal"}"#)
    );
    let times = [
        ("\"2020-02-03\"", Some(1_580_688_000_000)),
        ("\"2020-02-03 04:05:06.5\"", Some(1_580_702_706_500)),
        ("\"20200203040506\"", Some(1_580_702_706_000)),
        ("1580702706", Some(1_580_702_706_000)),
        ("1580702706123", Some(1_580_702_706_123)),
        ("\"1580702706\"", Some(1_580_702_706_000)),
        ("\"last week\"", None),
    ];
    for (time, expected) in times {
        let line = format!(r#"{{"doc":{{"body":"x"}},"when":{time}}}"#);
        let document = fields.parse(line.as_bytes(), &mut text).unwrap();
        assert_eq!(document.timestamp, expected, "{time}");
        let kept = expected.is_none().then(|| format!(r#"{{"when":{time}}}"#));
        assert_eq!(document.metadata, kept, "what is no time is not lost");
    }
}

#[test]
fn the_last_text_counts_whatever_it_is() {
    let parse = |mapping: &FieldMapping, line: &str| {
        // A text from before is no text of this line.
        let mut text = "before".to_owned();
        Fields::new(mapping).parse(line.as_bytes(), &mut text).map(|d| d.text.into_owned()).map_err(|bad| bad.detail)
    };
    let plain = FieldMapping::default();
    for (last, expected) in [
        (r#""b\n""#, Ok("b\n")),
        (r#"["b"], "text": "c""#, Ok("c")),
        ("null", Err("field \"text\" is null")),
        ("5", Err("field \"text\" is a number, not a string")),
        ("-5", Err("field \"text\" is a number, not a string")),
        ("0.5", Err("field \"text\" is a number, not a string")),
        ("true", Err("field \"text\" is a boolean, not a string")),
        (r#"["b", {"c": 1}]"#, Err("field \"text\" is an array, not a string")),
        (r#"{"b": ["c"]}"#, Err("field \"text\" is an object, not a string")),
    ] {
        let line = format!(r#"{{"text": "a", "text": {last}}}"#);
        assert_eq!(parse(&plain, &line), expected.map(str::to_owned).map_err(str::to_owned), "{line}");
    }
    // A text that is kept in the metadata too, and one below an object that is.
    let both = FieldMapping { metadata: vec!["text".into()], ..FieldMapping::default() };
    assert_eq!(parse(&both, r#"{"text": "a"}"#).unwrap(), "a");
    let below = FieldMapping { text: "a.b".into(), metadata: vec!["a".into()], ..FieldMapping::default() };
    assert_eq!(parse(&below, r#"{"a.b": "x", "a": {"b": "y"}}"#).unwrap(), "y");
    assert_eq!(parse(&below, r#"{"a": {"b": "y"}, "a.b": "x"}"#).unwrap(), "x");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn every_way_to_split_a_file_gives_the_same_documents_and_ids(
        lines in prop::collection::vec(prop::sample::select(vec![
            "{\"text\":\"a\"}", "{\"text\":\"bcd\"}\r", "", "\r", "{bad", "{\"text\":\"ü\"}", "{\"x\":1}", "  ",
            "{\"text\":\"a text that is longer than the limit of this test\"}",
        ]), 1..8),
        bom in any::<bool>(),
        last_newline in any::<bool>(),
    ) {
        let mut file = if bom { b"\xEF\xBB\xBF".to_vec() } else { Vec::new() };
        file.extend(lines.join("\n").bytes());
        if last_newline {
            file.push(b'\n');
        }
        let key = |rows: Vec<Row>| -> Vec<_> {
            let rows = rows.into_iter().filter(|row| row.rule.as_deref() != Some("empty_file"));
            rows.map(|row| (row.id, row.text, row.rule, row.offset, row.detail)).collect()
        };
        let whole = key(read_json_span(&file, WHOLE, 40));
        for limit in 1..=file.len() as u64 {
            let input = input_file("f".as_ref(), FileFormat::Jsonl, Compression::None, file.len() as u64);
            let mut split = Vec::new();
            for Split { range, .. } in splits::plan(&[input], limit).into_iter().flatten() {
                let range = range.unwrap_or(0..u64::MAX);
                let span = Span { start: range.start, end: range.end, by_offset: true };
                split.extend(key(read_json_span(&file, span, 40)));
            }
            prop_assert_eq!(&split, &whole, "split at {}", limit);
        }
    }
}

fn input_file(path: &std::path::Path, format: FileFormat, compression: Compression, size: u64) -> InputFile {
    InputFile { uri: "dir/file".into(), path: path.into(), input: 0, format, compression, size, mtime_ns: 0 }
}

// ---- Compression

const LINES: [&str; 4] =
    ["{\"text\":\"first\"}\n", "{\"text\":\"second\"}\n", "{\"text\":\"third\"}\n", "{\"text\":\"4\"}\n"];

#[test]
fn all_members_and_frames_are_read() {
    let members: Vec<u8> = [gzip(LINES[0].as_bytes()), gzip(b""), gzip(LINES[1..].concat().as_bytes())].concat();
    let frames: Vec<u8> =
        [&LINES[..2], &[], &LINES[2..]].map(|lines| zstd::encode_all(lines.concat().as_bytes(), 3).unwrap()).concat();
    let plain = read_bytes(FileFormat::Jsonl, Compression::None, LINES.concat().as_bytes(), LIMIT);
    let gz = read_bytes(FileFormat::Jsonl, Compression::Gzip, &members, LIMIT);
    let zst = read_bytes(FileFormat::Jsonl, Compression::Zstd, &frames, LIMIT);
    assert_eq!(texts(&plain), ["first", "second", "third", "4"]);
    assert_eq!(texts(&gz), texts(&plain));
    assert_eq!(gz, zst, "known by their number in either");
    assert_eq!(read_bytes(FileFormat::Text, Compression::Zstd, &frames, LIMIT)[0].text, LINES.concat());
}

#[test]
fn a_file_cut_anywhere_keeps_what_came_before() {
    let mut seed = 1u64;
    // Lines that do not compress, so that cuts fall into all of them.
    let lines: Vec<String> = (0..40)
        .map(|n| {
            let noise: String = (0..60)
                .map(|_| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    char::from(b'a' + u8::try_from((seed >> 33) % 26).unwrap())
                })
                .collect();
            format!("{{\"text\":\"{n} {noise}\"}}\n")
        })
        .collect();
    let plain = lines.concat();
    let all = read_bytes(FileFormat::Jsonl, Compression::None, plain.as_bytes(), LIMIT);
    let zst = zstd::encode_all(plain.as_bytes(), 1).unwrap();
    for (compression, bytes) in [(Compression::Gzip, gzip(plain.as_bytes())), (Compression::Zstd, zst)] {
        for cut in (1..bytes.len()).step_by(37) {
            let rows = read_bytes(FileFormat::Jsonl, compression, &bytes[..cut], LIMIT);
            let (last, good) = rows.split_last().unwrap();
            assert_eq!(last.rule.as_deref(), Some("truncated"), "{compression:?} cut at {cut}: {last:?}");
            assert_eq!(texts(good), texts(&all[..good.len()]));
            assert_eq!(last.offset, good.len() as u64);
        }
    }
    let not_gzip = read_bytes(FileFormat::Jsonl, Compression::Gzip, plain.as_bytes(), LIMIT);
    assert_eq!(rules(&not_gzip), ["corrupt"]);
}

// ---- Text

#[test]
fn a_text_file_is_one_document() {
    let read = |bytes: &[u8]| read_bytes(FileFormat::Text, Compression::None, bytes, 20);
    assert_eq!(texts(&read(b"\xEF\xBB\xBFa\r\nb")), ["a\r\nb"]);
    let cases: [(&[u8], &str); 6] = [
        (b"", "empty_file"),
        (b" \n", "empty_text"),
        (b"abc\xff", "invalid_utf8"),
        (b"\xff\xfea\0", "invalid_utf8"),
        (&[b'x'; 21], "too_long"),
        (b"\xEF\xBB\xBF", "empty_text"),
    ];
    for (bytes, rule) in cases {
        assert_eq!(rules(&read(bytes)), [rule]);
    }
}

// ---- WARC

fn record(kind: &str, headers: &str, block: &[u8]) -> Vec<u8> {
    record_of_length(kind, headers, block, block.len())
}

fn record_of_length(kind: &str, headers: &str, block: &[u8], length: usize) -> Vec<u8> {
    let mut bytes = format!("WARC/1.0\r\nWARC-Type: {kind}\r\n{headers}Content-Length: {length}\r\n\r\n").into_bytes();
    bytes.extend(block);
    bytes.extend(b"\r\n\r\n");
    bytes
}

fn wet(text: &str) -> Vec<u8> {
    let headers = "WARC-Target-URI: http://x/\r\nWARC-Date: 2020-02-03T04:05:06Z\r\n\
                   WARC-Identified-Content-Language: eng,fra\r\nContent-Type: text/plain\r\n";
    record("conversion", headers, text.as_bytes())
}

fn response(head: &str, body: &[u8]) -> Vec<u8> {
    let mut block = format!("HTTP/1.1 {head}\r\n\r\n").into_bytes();
    block.extend(body);
    record("response", "WARC-Target-URI: <http://x/>\r\nContent-Type: application/http; msgtype=response\r\n", &block)
}

fn page(sentence: &str) -> String {
    format!("<html><head><title>t</title></head><body><article><p>{}</p></article></body></html>", sentence.repeat(20))
}

#[test]
fn responses_and_conversions_become_documents() {
    let html = page("Le café est ouvert, et la porte aussi, toute la journée. ");
    let latin: Vec<u8> = html.chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect();
    let body = gzip(html.as_bytes());
    let (first, rest) = body.split_at(100);
    let mut chunked = format!("{:x}\r\n", first.len()).into_bytes();
    chunked.extend(first);
    chunked.extend(format!("\r\n{:X};a=b\r\n", rest.len()).bytes());
    chunked.extend(rest);
    chunked.extend(b"\r\n0\r\n\r\n");
    let records = [
        record("warcinfo", "Content-Type: application/warc-fields\r\n", b"software: x\r\n"),
        record("request", "Content-Type: application/http; msgtype=request\r\n", b"GET / HTTP/1.1\r\n\r\n"),
        response(
            "200 OK\r\nContent-Type: text/html; charset=utf-8\r\nTransfer-Encoding: chunked\r\nContent-Encoding: gzip",
            &chunked,
        ),
        // The header names the wrong character set.
        response("200 OK\r\nContent-Type: text/html; charset=utf-8", &latin),
        response("404 Not Found\r\nContent-Type: text/html", html.as_bytes()),
        response("200 OK\r\nContent-Type: application/pdf", b"%PDF"),
        response("200 OK\r\nContent-Type: text/html\r\nContent-Encoding: br", b"\x01\x02"),
        response("200 OK\r\nContent-Type: text/html", b"<html><body></body></html>"),
        response("200 OK\r\nContent-Type: text/plain", b"just text"),
        response("not http", b""),
        record("revisit", "WARC-Target-URI: http://x/\r\n", b"HTTP/1.1 200 OK\r\n\r\n"),
        wet("Bonjour.\nEncore.\n"),
        record("resource", "WARC-Target-URI: http://x/\r\nContent-Type: text/html\r\n", html.as_bytes()),
    ];
    let plain = records.concat();
    let rows = read_bytes(FileFormat::Warc, Compression::None, &plain, LIMIT);
    let dropped = ["http_status", "content_type", "content_type", "no_text", "invalid_http"];
    assert_eq!(rules(&rows), dropped);
    let found = texts(&rows);
    assert_eq!(found.len(), 5);
    assert!(found[0].starts_with("Le café est ouvert") && found[0].ends_with("toute la journée."), "{}", found[0]);
    assert_eq!(found[1], found[0]);
    assert_eq!(found[2..4], ["just text", "Bonjour.\nEncore.\n"]);
    assert_eq!(found[4], found[0]);
    let wet = rows.iter().find(|row| row.language.is_some()).unwrap();
    assert_eq!((wet.language.as_deref(), wet.timestamp), (Some("eng"), Some(1_580_702_706_000)));
    assert!(rows.iter().all(|row| row.url.as_deref() == Some("http://x/")), "{rows:?}");

    let by_member: Vec<u8> = records.iter().flat_map(|record| gzip(record)).collect();
    for (compression, bytes) in [
        (Compression::Gzip, by_member),
        (Compression::Gzip, gzip(&plain)),
        (Compression::Zstd, zstd::encode_all(&plain[..], 3).unwrap()),
    ] {
        let packed = read_bytes(FileFormat::Warc, compression, &bytes, LIMIT);
        assert_eq!((texts(&packed), rules(&packed)), (texts(&rows), rules(&rows)), "{compression:?}");
        assert_eq!(packed[0].offset, 2, "the number of the record");
    }
    assert_eq!(&plain[usize::try_from(rows[0].offset).unwrap()..][..6], b"WARC/1");
}

#[test]
fn a_wrong_content_length_costs_one_record() {
    let block = b"one bad record that has some length to it, and no more than that";
    for length in [10, block.len() - 1, block.len() + 150, 100_000] {
        let bad = record_of_length("conversion", "", block, length);
        let plain = [wet("a"), bad.clone(), wet("b"), wet("c")].concat();
        let rows = read_bytes(FileFormat::Warc, Compression::None, &plain, LIMIT);
        assert_eq!(texts(&rows), ["a", "b", "c"], "length {length}");
        assert_eq!(rules(&rows), ["invalid_record"], "length {length}");
        assert!(rows[1].excerpt.as_ref().unwrap().contains("one bad record"));
        let members = [gzip(&wet("a")), gzip(&bad), gzip(&wet("b")), gzip(&wet("c"))].concat();
        let rows = read_bytes(FileFormat::Warc, Compression::Gzip, &members, LIMIT);
        assert_eq!((texts(&rows), rules(&rows)), (vec!["a", "b", "c"], vec!["invalid_record"]), "length {length}");
    }
    let noise =
        [wet("a"), b"noise\nnoise\n".to_vec(), wet("b"), b"WARC/1.0\r\nA: b\r\n\r\n".to_vec(), wet("c")].concat();
    let rows = read_bytes(FileFormat::Warc, Compression::None, &noise, LIMIT);
    assert_eq!((texts(&rows), rules(&rows)), (vec!["a", "b", "c"], vec!["invalid_record", "invalid_record"]));
}

#[test]
fn long_records_and_cut_files_are_quarantined() {
    let long = "x".repeat(5000);
    let records = [wet("a"), wet(&long), wet("b")];
    for compression in [Compression::None, Compression::Gzip] {
        let bytes = match compression {
            Compression::Gzip => records.iter().flat_map(|record| gzip(record)).collect(),
            _ => records.concat(),
        };
        let rows = read_bytes(FileFormat::Warc, compression, &bytes, 1000);
        assert_eq!((texts(&rows), rules(&rows)), (vec!["a", "b"], vec!["too_long"]));
        let cut = read_bytes(FileFormat::Warc, compression, &bytes[..bytes.len() - 30], LIMIT);
        assert_eq!((texts(&cut).len(), rules(&cut)), (2, vec!["truncated"]), "{compression:?}");
    }
    assert_eq!(rules(&read_bytes(FileFormat::Warc, Compression::None, b"", LIMIT)), ["empty_file"]);
    assert_eq!(rules(&read_bytes(FileFormat::Warc, Compression::Gzip, &gzip(b"\r\n"), LIMIT)), ["empty_file"]);
}

#[test]
fn a_broken_member_costs_no_more_than_itself_and_the_next() {
    let members: Vec<Vec<u8>> = (0..10).map(|n| gzip(&wet(&format!("text {n} {}", "word ".repeat(n * 7))))).collect();
    let whole = members.concat();
    let mut at = 0;
    for (n, member) in members.iter().enumerate() {
        for place in [0, 12, member.len() / 2, member.len() - 6] {
            let mut bytes = whole.clone();
            bytes[at + place] ^= 0x55;
            let rows = read_bytes(FileFormat::Warc, Compression::Gzip, &bytes, LIMIT);
            let found = texts(&rows).len();
            assert!(found >= 8, "member {n}, byte {place}: {found} of 10");
            assert!(found == 10 || !rules(&rows).is_empty());
            assert!(rules(&rows).len() <= 2, "{:?}", rules(&rows));
        }
        at += member.len();
    }
}

// ---- Parquet

fn parquet_bytes(batch: &RecordBatch, group_rows: usize) -> Vec<u8> {
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(group_rows)).build();
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties)).unwrap();
    writer.write(batch).unwrap();
    writer.into_inner().unwrap()
}

fn articles(rows: i64) -> RecordBatch {
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values((0..rows).map(|n| format!("article {n}"))));
    let views: ArrayRef = Arc::new(Int64Array::from_iter_values(0..rows));
    let urls: ArrayRef = Arc::new(StringArray::from_iter((0..rows).map(|n| (n % 2 == 0).then(|| format!("u{n}")))));
    let inner =
        ArrowFields::from(vec![Field::new("body", DataType::Utf8, true), Field::new("views", DataType::Int64, true)]);
    let nested: ArrayRef = Arc::new(StructArray::new(inner, vec![texts.clone(), views.clone()], None));
    let schema = Schema::new(vec![
        Field::new("text", DataType::Utf8, true),
        Field::new("url", DataType::Utf8, true),
        Field::new("timestamp", DataType::Int64, true),
        Field::new("doc", nested.data_type().clone(), true),
        Field::new("number", DataType::Int64, true),
    ]);
    RecordBatch::try_new(Arc::new(schema), vec![texts, urls, views.clone(), nested, views]).unwrap()
}

fn read_parquet(bytes: &[u8], span: Span, fields: &FieldMapping) -> Vec<Row> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    collect(|rows| super::parquet::read(&ParquetFile::Local(file), span, fields, LIMIT, rows))
}

#[test]
fn parquet_columns_are_mapped_and_row_groups_split() {
    let bytes = parquet_bytes(&articles(1000), 64);
    let fields = FieldMapping {
        text: "doc.body".into(),
        id: Some("number".into()),
        metadata: vec!["doc".into(), "absent".into()],
        ..FieldMapping::default()
    };
    let whole = read_parquet(&bytes, WHOLE, &fields);
    assert_eq!(whole.len(), 1000);
    let row = &whole[200];
    assert_eq!((row.text.as_str(), row.url.as_deref(), row.offset), ("article 200", Some("u200"), 200));
    assert_eq!(row.timestamp, Some(200_000));
    assert_eq!(row.metadata.as_deref(), Some(r#"{"id":200,"doc":{"body":"article 200","views":200}}"#));
    for limit in [1, 100, 1000, 7777, bytes.len() as u64 - 1] {
        let input = input_file("f".as_ref(), FileFormat::Parquet, Compression::None, bytes.len() as u64);
        let split: Vec<Row> = splits::plan(&[input], limit)
            .into_iter()
            .flatten()
            .filter(|split| limit > 1 || split.range.as_ref().unwrap().start < 500)
            .flat_map(|split| {
                let range = split.range.unwrap();
                read_parquet(&bytes, Span { start: range.start, end: range.end, by_offset: true }, &fields)
            })
            .collect();
        if limit > 1 {
            assert_eq!(split, whole, "split at {limit}");
        } else {
            assert!(!split.is_empty());
            assert_eq!(split, whole[..split.len()], "single bytes");
        }
    }
}

#[test]
fn parquet_of_another_schema_or_broken_is_one_quarantined_record() {
    let bytes = parquet_bytes(&articles(100), 100);
    let mapped = |name: &str| FieldMapping { text: name.into(), ..FieldMapping::default() };
    let rows = read_parquet(&bytes, WHOLE, &mapped("content"));
    assert_eq!(rules(&rows), ["wrong_schema"]);
    let detail = rows[0].detail.as_deref().unwrap();
    assert!(detail.contains("no field \"content\" among text, url") && detail.contains("is it \"text\"?"), "{detail}");
    let rows = read_parquet(&bytes, WHOLE, &mapped("number"));
    assert_eq!(rules(&rows), ["wrong_schema"]);
    assert!(rows[0].detail.as_deref().unwrap().contains("is Int64, not a string"));
    assert_eq!(rules(&read_parquet(&bytes[..bytes.len() - 9], WHOLE, &mapped("text"))), ["corrupt"]);
    assert_eq!(rules(&read_parquet(b"", WHOLE, &mapped("text"))), ["empty_file"]);
    assert_eq!(rules(&read_parquet(&parquet_bytes(&articles(0), 10), WHOLE, &mapped("text"))), ["empty_file"]);
    let nothing = read_parquet(&bytes[..50], Span { start: 10, end: 50, by_offset: true }, &mapped("text"));
    assert_eq!(nothing, [], "told once, by the first range");
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_a_remote_store_are_read_the_same() {
    let store = Arc::new(object_store::memory::InMemory::new());
    let batch = articles(3000);
    let bytes = parquet_bytes(&batch, 1000);
    let path = object_store::path::Path::from("a.parquet");
    store.put(&path, bytes.clone().into()).await.unwrap();
    let file = ParquetFile::open(store.clone(), &path).await.unwrap();
    let remote = tokio::task::spawn_blocking(move || {
        collect(|rows| super::parquet::read(&file, WHOLE, &FieldMapping::default(), LIMIT, rows))
    });
    assert_eq!(remote.await.unwrap(), read_parquet(&bytes, WHOLE, &FieldMapping::default()));

    let lines: String = (0..50_000).map(|n| format!("{{\"text\":\"line {n}\"}}\n")).collect();
    let path = object_store::path::Path::from("a.jsonl");
    store.put(&path, lines.clone().into()).await.unwrap();
    let (rows, receiver) = tokio::sync::mpsc::channel(1);
    let file = super::bytes::StoredFile::open(store.as_ref(), &path, 0, rows).await.unwrap();
    let remote = tokio::task::spawn_blocking(move || {
        collect(|rows| json::read(file, WHOLE, &Fields::new(&FieldMapping::default()), LIMIT, rows))
    });
    assert_eq!(remote.await.unwrap(), read_json_span(lines.as_bytes(), WHOLE, LIMIT));
    drop(receiver);
}

// ---- The scan

#[tokio::test(flavor = "multi_thread")]
async fn a_scan_numbers_its_rows_and_ends_its_thread_when_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("we ird#%[1].jsonl");
    let lines: String = (0..60_000).map(|n| format!("{{\"text\":\"line {n} {}\"}}\n", "x".repeat(200))).collect();
    std::fs::write(&path, &lines).unwrap();
    let file = input_file(&path, FileFormat::Jsonl, Compression::None, lines.len() as u64);
    let split = Split { file: file.uri.clone(), range: None };
    let table = |read: &Arc<AtomicU64>| {
        let context =
            ScanContext { shard: 7, max_record_bytes: LIMIT, read: read.clone(), bad: BadRecords::new(1000).task() };
        let splits = [(&split, &file, "source", Arc::new(FieldMapping::default()))];
        Arc::new(RawTable::new(splits, context).unwrap())
    };
    let session = SessionContext::new();
    let read = Arc::new(AtomicU64::new(0));
    let rows = session.read_table(table(&read)).unwrap();
    let rows = rows.select_columns(&["ordinal", "text"]).unwrap().collect().await.unwrap();
    let ordinals: Vec<u64> =
        rows.iter().flat_map(|b| b.column(0).as_primitive::<UInt64Type>().values().to_vec()).collect();
    assert_eq!(ordinals, (0..60_000u64).map(|n| 7 << 32 | n).collect::<Vec<_>>());
    assert_eq!(read.load(Ordering::SeqCst), 60_000);

    let read = Arc::new(AtomicU64::new(0));
    let mut stream = session.read_table(table(&read)).unwrap().execute_stream().await.unwrap();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    let mut last = u64::MAX;
    while last != read.load(Ordering::SeqCst) {
        last = read.load(Ordering::SeqCst);
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    assert!(last < 30_000, "{last} lines were read though nobody wanted them");

    std::fs::remove_file(&path).unwrap();
    let error = session.read_table(table(&read)).unwrap().collect().await.unwrap_err().to_string();
    assert!(error.contains("cannot read dir/file"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_group_behind_the_end_of_a_file_that_is_cut_is_quarantined() {
    let bytes = parquet_bytes(&articles(2000), 1000);
    // The footer without the data before it: the second row group begins behind the end of the file.
    let end = bytes.len() - 8;
    let footer = u32::from_le_bytes(<[u8; 4]>::try_from(&bytes[end..end + 4]).unwrap()) as usize;
    let damaged = [&bytes[..4], &bytes[end - footer..]].concat();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("damaged.parquet");
    std::fs::write(&path, &damaged).unwrap();
    let file = input_file(&path, FileFormat::Parquet, Compression::None, damaged.len() as u64);
    let splits: Vec<Split> = splits::plan(std::slice::from_ref(&file), 300).into_iter().flatten().collect();
    assert!(splits.len() > 2, "{splits:?}");
    let mut found = Vec::new();
    for split in &splits {
        let context = ScanContext {
            shard: 7,
            max_record_bytes: LIMIT,
            read: Arc::new(AtomicU64::new(0)),
            bad: BadRecords::new(1000).task(),
        };
        let part = [(split, &file, "source", Arc::new(FieldMapping::default()))];
        let table = Arc::new(RawTable::new(part, context).unwrap());
        let batches = SessionContext::new().read_table(table).unwrap().collect().await.unwrap();
        found.extend(batches.iter().flat_map(rows_of));
    }
    assert_eq!(rules(&found), ["corrupt", "corrupt"], "{found:?}");
    assert_eq!(found.iter().map(|row| row.offset).collect::<Vec<_>>(), [0, 1000]);
}

// ---- Anything

proptest! {
    #[test]
    fn arbitrary_bytes_are_accounted_for_by_every_reader(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
        limit in 1usize..300,
    ) {
        for format in [FileFormat::Jsonl, FileFormat::Text, FileFormat::Warc, FileFormat::Parquet] {
            for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
                prop_assert!(!read_bytes(format, compression, &bytes, limit).is_empty());
                let packed = match compression {
                    Compression::Gzip => gzip(&bytes),
                    _ => zstd::encode_all(&bytes[..], 1).unwrap(),
                };
                read_bytes(format, compression, &packed, limit);
            }
        }
    }

    #[test]
    fn damaged_files_are_accounted_for_by_every_reader(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let warc = [wet("a"), response("200 OK\r\nContent-Type: text/plain", b"b"), wet("c")];
        let files = [
            (FileFormat::Warc, Compression::None, warc.concat()),
            (FileFormat::Warc, Compression::Gzip, warc.iter().flat_map(|r| gzip(r)).collect()),
            (FileFormat::Warc, Compression::Zstd, zstd::encode_all(&warc.concat()[..], 1).unwrap()),
            (FileFormat::Jsonl, Compression::Gzip, gzip(LINES.concat().as_bytes())),
            (FileFormat::Jsonl, Compression::Zstd, zstd::encode_all(LINES.concat().as_bytes(), 1).unwrap()),
            (FileFormat::Parquet, Compression::None, parquet_bytes(&articles(30), 10)),
        ];
        for (format, compression, mut bytes) in files {
            for (place, byte) in &damage {
                let place = place.index(bytes.len());
                bytes[place] = *byte;
            }
            read_bytes(format, compression, &bytes, LIMIT);
            bytes.truncate(cut.index(bytes.len()));
            read_bytes(format, compression, &bytes, LIMIT);
        }
    }
}
