//! From the paths of a recipe to a sorted list of files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use globset::{GlobBuilder, GlobMatcher};
use serde::{Deserialize, Serialize};

use super::config::{InputConfig, InputFormat};
use crate::error::{Error, Result};

/// How the bytes of a file are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip, any number of members.
    Gzip,
    /// Zstandard, any number of frames.
    Zstd,
}

/// What the records of a file are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileFormat {
    /// WARC or WET.
    Warc,
    /// JSON lines.
    Jsonl,
    /// Parquet.
    Parquet,
    /// One text.
    Text,
}

/// One input file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InputFile {
    /// The path as listed, relative to the recipe's directory: what document ids are made of.
    pub uri: String,
    /// Where it is now.
    #[serde(skip)]
    pub path: PathBuf,
    /// Which of the inputs it belongs to.
    pub input: usize,
    /// What its records are.
    pub format: FileFormat,
    /// How it is compressed.
    pub compression: Compression,
    /// Size in bytes.
    pub size: u64,
    /// Time of the last change, Unix time in nanoseconds, so that a changed file is noticed.
    pub mtime_ns: i64,
}

/// The files of all inputs.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// In order of the inputs, then of the URI.
    pub files: Vec<InputFile>,
    /// Files of directories and globs that were left out because their extension says nothing.
    pub skipped: Vec<String>,
}

/// List the files of `inputs`. A pattern without a file is an error of the recipe.
pub fn list(inputs: &[InputConfig], base: &Path) -> Result<Listing> {
    let mut listing = Listing::default();
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for (number, input) in inputs.iter().enumerate() {
        let mut found: BTreeMap<String, bool> = BTreeMap::new();
        for pattern in &input.paths {
            for (uri, named) in expand(input, pattern, base)? {
                *found.entry(uri).or_default() |= named;
            }
        }
        for (uri, named) in found {
            let Some((format, compression)) = kind(&uri, input.format) else {
                if named {
                    return Err(Error::Recipe(format!(
                        "input {:?}: cannot tell the format of {uri} from its extension; set format to one of \
                         warc, wet, jsonl, parquet, text",
                        input.source
                    )));
                }
                listing.skipped.push(uri);
                continue;
            };
            if let Some(other) = seen.insert(uri.clone(), number) {
                return Err(Error::Recipe(format!(
                    "{uri} belongs to two inputs, {:?} and {:?}; its documents would have the same ids",
                    inputs[other].source, input.source
                )));
            }
            let path = base.join(&uri);
            let metadata = fs::metadata(&path).map_err(|e| Error::io(&path, e))?;
            let mtime_ns = metadata
                .modified()
                .ok()
                .and_then(|t| t.duration_since(UNIX_EPOCH).ok())
                .and_then(|d| i64::try_from(d.as_nanos()).ok())
                .unwrap_or(0);
            // Canonical, because an object store takes no `..`; the uri keeps the name as listed.
            let path = fs::canonicalize(&path).map_err(|e| Error::io(&path, e))?;
            listing.files.push(InputFile {
                uri,
                path,
                input: number,
                format,
                compression,
                size: metadata.len(),
                mtime_ns,
            });
        }
    }
    Ok(listing)
}

/// Format and compression of a file.
fn kind(uri: &str, format: InputFormat) -> Option<(FileFormat, Compression)> {
    let name = uri.rsplit('/').next().unwrap_or(uri).to_ascii_lowercase();
    let (stem, compression) = match name.rsplit_once('.') {
        Some((stem, "gz" | "gzip")) => (stem, Compression::Gzip),
        Some((stem, "zst" | "zstd")) => (stem, Compression::Zstd),
        _ => (name.as_str(), Compression::None),
    };
    let format = match format {
        InputFormat::Warc | InputFormat::Wet => FileFormat::Warc,
        InputFormat::Jsonl => FileFormat::Jsonl,
        InputFormat::Parquet => FileFormat::Parquet,
        InputFormat::Text => FileFormat::Text,
        InputFormat::Auto => match stem.rsplit_once('.')?.1 {
            "warc" | "wet" => FileFormat::Warc,
            "jsonl" | "ndjson" | "json" => FileFormat::Jsonl,
            "parquet" => FileFormat::Parquet,
            "txt" | "text" | "md" => FileFormat::Text,
            _ => return None,
        },
    };
    match (format, compression) {
        // Parquet compresses inside; `.parquet.gz` would have to be unpacked first.
        (FileFormat::Parquet, Compression::Gzip | Compression::Zstd) => None,
        kind => Some(kind),
    }
}

/// The files of one pattern, and whether the recipe names them one by one.
fn expand(input: &InputConfig, pattern: &str, base: &Path) -> Result<Vec<(String, bool)>> {
    let refuse = |reason: &str| Err(Error::Recipe(format!("input {:?}: path {pattern:?} {reason}", input.source)));
    if let Some((scheme, _)) = pattern.split_once("://") {
        return refuse(&format!("is a {scheme} URL; inputs are read from the local file system"));
    }
    let mut clean = pattern.trim_end_matches('/');
    while let Some(rest) = clean.strip_prefix("./") {
        clean = rest.trim_start_matches('/');
    }
    let clean = match clean {
        "" if pattern.starts_with('/') => "/",
        "" => ".",
        other => other,
    };
    let mut files = Vec::new();
    let path = base.join(clean);
    if path.is_file() {
        return Ok(vec![(clean.to_owned(), true)]);
    }
    if path.is_dir() {
        walk(base, if clean == "." { "" } else { clean }, Take::All, &mut Vec::new(), &mut files)?;
        return if files.is_empty() { refuse("is a directory without files") } else { Ok(named(files)) };
    }
    if !clean.contains(['*', '?', '[', '{']) {
        return refuse(&format!("does not exist (looked for {})", path.display()));
    }
    let glob = match GlobBuilder::new(clean).literal_separator(true).build() {
        Ok(glob) => glob.compile_matcher(),
        Err(e) => return refuse(&format!("is not a valid pattern: {e}")),
    };
    // Only the part before the first wildcard is certain.
    let wildcard = clean.find(['*', '?', '[', '{']).unwrap_or(0);
    let root = match clean[..wildcard].rfind('/') {
        Some(0) => "/",
        Some(end) => &clean[..end],
        None => "",
    };
    if base.join(root).is_dir() {
        walk(base, root, Take::Matching(&glob), &mut Vec::new(), &mut files)?;
    }
    if files.is_empty() { refuse("matches no file") } else { Ok(named(files)) }
}

fn named(files: Vec<String>) -> Vec<(String, bool)> {
    files.into_iter().map(|uri| (uri, false)).collect()
}

#[derive(Clone, Copy)]
enum Take<'a> {
    All,
    Matching(&'a GlobMatcher),
}

/// Collect the files below `dir`, which is written as the recipe writes it.
fn walk(base: &Path, dir: &str, take: Take<'_>, above: &mut Vec<PathBuf>, files: &mut Vec<String>) -> Result<()> {
    let path = base.join(dir);
    let real = fs::canonicalize(&path).map_err(|e| Error::io(&path, e))?;
    if above.contains(&real) {
        // A symbolic link back up.
        return Ok(());
    }
    above.push(real);
    for entry in fs::read_dir(&path).map_err(|e| Error::io(&path, e))? {
        let entry = entry.map_err(|e| Error::io(&path, e))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else {
            return Err(Error::Corrupt { path: entry.path(), reason: "the file name is not UTF-8".into() });
        };
        if name.starts_with('.') {
            continue;
        }
        let uri = match dir {
            "" => name.to_owned(),
            "/" => format!("/{name}"),
            dir => format!("{dir}/{name}"),
        };
        let matches = match take {
            Take::All => true,
            Take::Matching(glob) => glob.is_match(&uri),
        };
        let metadata = fs::metadata(entry.path()).map_err(|e| Error::io(entry.path(), e))?;
        if metadata.is_dir() {
            walk(base, &uri, if matches { Take::All } else { take }, above, files)?;
        } else if matches && metadata.is_file() {
            files.push(uri);
        }
    }
    above.pop();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(paths: &[&str]) -> InputConfig {
        InputConfig {
            source: "s".into(),
            paths: paths.iter().map(|p| p.to_string()).collect(),
            format: InputFormat::Auto,
            fields: Default::default(),
        }
    }

    fn uris(paths: &[&str], base: &Path) -> Vec<String> {
        list(&[input(paths)], base).unwrap().files.into_iter().map(|f| f.uri).collect()
    }

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "b/2.jsonl",
            "b/1.jsonl.gz",
            "b/c/x.warc.gz",
            "b/.hidden/y.jsonl",
            "b/.z.jsonl",
            "b/README",
            "a.txt",
            "we ird#%[1].txt",
        ] {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        dir
    }

    #[test]
    fn directories_globs_and_files_give_one_sorted_list() {
        let dir = tree();
        let base = dir.path();
        assert_eq!(uris(&["b", "a.txt"], base), ["a.txt", "b/1.jsonl.gz", "b/2.jsonl", "b/c/x.warc.gz"]);
        assert_eq!(uris(&["./b/"], base), ["b/1.jsonl.gz", "b/2.jsonl", "b/c/x.warc.gz"]);
        assert_eq!(uris(&["b/*.jsonl*", "b/2.jsonl"], base), ["b/1.jsonl.gz", "b/2.jsonl"]);
        assert_eq!(uris(&["**/*.{warc,jsonl}*"], base), ["b/1.jsonl.gz", "b/2.jsonl", "b/c/x.warc.gz"]);
        assert_eq!(uris(&["[b]"], base), uris(&["b"], base));
        assert_eq!(uris(&["we ird#%[1].txt"], base), ["we ird#%[1].txt"]);
        let skipped = list(&[input(&["b"])], base).unwrap().skipped;
        assert_eq!(skipped, ["b/README"]);
        let absolute = base.join("b/2.jsonl").to_str().unwrap().to_owned();
        assert_eq!(uris(&[&absolute], base), [absolute]);
    }

    #[test]
    fn a_loop_of_links_ends() {
        let dir = tree();
        std::os::unix::fs::symlink(dir.path(), dir.path().join("b/up")).unwrap();
        let found = uris(&["b"], dir.path());
        assert!(found.contains(&"b/2.jsonl".to_owned()), "{found:?}");
    }

    #[test]
    fn what_is_not_there_is_named() {
        let dir = tree();
        let error = |paths: &[&str]| list(&[input(paths)], dir.path()).unwrap_err().to_string();
        assert!(error(&["nope.txt"]).contains("input \"s\": path \"nope.txt\" does not exist"));
        assert!(error(&["b/*.nope"]).contains("path \"b/*.nope\" matches no file"));
        assert!(error(&["b/README"]).contains("set format"));
        assert!(error(&["s3://bucket/x"]).contains("s3 URL"));
        let twice = list(&[input(&["b"]), input(&["b/2.jsonl"])], dir.path()).unwrap_err().to_string();
        assert!(twice.contains("belongs to two inputs"), "{twice}");
    }

    #[test]
    fn extensions_tell_format_and_compression() {
        use Compression::*;
        use FileFormat::*;
        let auto = |name| kind(name, InputFormat::Auto);
        assert_eq!(auto("x/CC.warc.wet.gz"), Some((Warc, Gzip)));
        assert_eq!(auto("a.WARC"), Some((Warc, None)));
        assert_eq!(auto("a.b/c.json.zst"), Some((Jsonl, Zstd)));
        assert_eq!(auto("a.parquet"), Some((Parquet, None)));
        assert_eq!(auto("a.parquet.gz"), Option::None);
        assert_eq!(auto("a.gz"), Option::None);
        assert_eq!(auto("dir.jsonl/readme"), Option::None);
        assert_eq!(kind("a.gz", InputFormat::Text), Some((Text, Gzip)));
    }
}
