//! From the paths of a recipe to a sorted list of files.

use std::collections::{BTreeMap, HashMap};
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
    /// Files of directories and globs that were left out.
    pub skipped: Vec<Skipped>,
}

/// A file that was left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// The path, as far as it can be written.
    pub name: String,
    /// Why.
    pub reason: &'static str,
}

/// List the files of `inputs`. A pattern without a file is an error of the recipe.
pub fn list(inputs: &[InputConfig], base: &Path) -> Result<Listing> {
    let mut listing = Listing::default();
    let mut seen: HashMap<PathBuf, (usize, String)> = HashMap::new();
    for (number, input) in inputs.iter().enumerate() {
        let mut found: BTreeMap<String, bool> = BTreeMap::new();
        for pattern in &input.paths {
            for (uri, named) in expand(number, pattern, base, &mut listing.skipped)? {
                *found.entry(uri).or_default() |= named;
            }
        }
        for (uri, named) in found {
            let Some((format, compression)) = kind(&uri, input.format) else {
                if named {
                    return Err(Error::setting(
                        format!("ingest.inputs.{number}.paths"),
                        format!(
                            "cannot tell the format of {uri} from its extension; set format to one of warc, wet, jsonl, \
                             parquet, text"
                        ),
                    ));
                }
                listing.skipped.push(Skipped { name: uri, reason: "its extension does not tell the format" });
                continue;
            };
            let path = base.join(&uri);
            let metadata = fs::metadata(&path).map_err(|e| Error::io(&path, e))?;
            // Canonical, because an object store takes no `..`, and because one file may be spelled in many ways; the
            // uri keeps the name as listed.
            let path = fs::canonicalize(&path).map_err(|e| Error::io(&path, e))?;
            match seen.get(&path) {
                Some((other, first)) if *other == number => {
                    if *first != uri {
                        listing
                            .skipped
                            .push(Skipped { name: uri, reason: "the same file is listed under another name" });
                    }
                    continue;
                }
                Some((other, _)) => {
                    return Err(Error::setting(
                        format!("ingest.inputs.{number}.paths"),
                        format!(
                            "{uri} belongs to two inputs, {:?} and {:?}; its documents would be there twice",
                            inputs[*other].source, input.source
                        ),
                    ));
                }
                None => seen.insert(path.clone(), (number, uri.clone())),
            };
            let mtime_ns = metadata
                .modified()
                .ok()
                .and_then(|t| t.duration_since(UNIX_EPOCH).ok())
                .and_then(|d| i64::try_from(d.as_nanos()).ok())
                .unwrap_or(0);
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
fn expand(number: usize, pattern: &str, base: &Path, skipped: &mut Vec<Skipped>) -> Result<Vec<(String, bool)>> {
    let refuse =
        |reason: &str| Err(Error::setting(format!("ingest.inputs.{number}.paths"), format!("{pattern:?} {reason}")));
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
    let path = base.join(clean);
    if path.is_file() {
        return Ok(vec![(clean.to_owned(), true)]);
    }
    let mut walk = Walk { base, above: Vec::new(), files: Vec::new(), skipped };
    let nothing = if path.is_dir() {
        walk.directory(if clean == "." { "" } else { clean }, Take::All)?;
        "is a directory without files"
    } else if !clean.contains(WILDCARDS) {
        return refuse(&format!("does not exist (looked for {})", path.display()));
    } else {
        let parts = match parts(clean) {
            Ok(parts) => parts,
            Err(e) => return refuse(&format!("is not a valid pattern: {e}")),
        };
        let root = if clean.starts_with('/') { "/" } else { "" };
        walk.directory(root, Take::Matching(&parts))?;
        "matches no file"
    };
    let files = walk.files;
    if files.is_empty() { refuse(nothing) } else { Ok(files.into_iter().map(|uri| (uri, false)).collect()) }
}

const WILDCARDS: [char; 4] = ['*', '?', '[', '{'];

/// What one level of a pattern matches.
enum Part {
    /// This name.
    Name(String),
    /// Names of this form.
    Names(GlobMatcher),
    /// Everything from here on, whose path below this level matches: where a wildcard may span levels.
    Paths(GlobMatcher),
}

/// The levels of a pattern, so that only directories that can lead to a match are read.
fn parts(pattern: &str) -> Result<Vec<Part>, globset::Error> {
    let glob = |text: &str| Ok(GlobBuilder::new(text).literal_separator(true).build()?.compile_matcher());
    let mut parts = Vec::new();
    let mut rest = pattern.trim_start_matches('/');
    while !rest.is_empty() {
        let (part, after) = rest.split_once('/').unwrap_or((rest, ""));
        let spans = part.contains("**") || part.matches(['{', '[']).count() != part.matches(['}', ']']).count();
        if spans {
            parts.push(Part::Paths(glob(rest)?));
            return Ok(parts);
        }
        parts.push(if part.contains(WILDCARDS) { Part::Names(glob(part)?) } else { Part::Name(part.to_owned()) });
        rest = after.trim_start_matches('/');
    }
    Ok(parts)
}

/// Which entries of a directory are wanted.
#[derive(Clone, Copy)]
enum Take<'a> {
    /// Everything below.
    All,
    /// What matches the levels of a pattern.
    Matching(&'a [Part]),
    /// What matches by its path from `from` bytes of the URI on.
    Below { glob: &'a GlobMatcher, from: usize },
}

/// Collects files below a directory.
struct Walk<'a> {
    base: &'a Path,
    /// The directories above, to end at a symbolic link back up.
    above: Vec<PathBuf>,
    files: Vec<String>,
    skipped: &'a mut Vec<Skipped>,
}

impl Walk<'_> {
    /// Collect what is wanted of the directory `dir`, which is written as the recipe writes it.
    fn directory(&mut self, dir: &str, take: Take<'_>) -> Result<()> {
        let path = self.base.join(dir);
        let below = |name: &str| match dir {
            "" => name.to_owned(),
            "/" => format!("/{name}"),
            dir => format!("{dir}/{name}"),
        };
        if let Take::Matching([Part::Name(name), rest @ ..]) = take {
            // Named, so hidden ones too.
            let uri = below(name);
            let found = self.base.join(&uri);
            return match rest {
                [] if found.is_dir() => self.directory(&uri, Take::All),
                [] if found.is_file() => {
                    self.files.push(uri);
                    Ok(())
                }
                rest if found.is_dir() => self.directory(&uri, Take::Matching(rest)),
                _ => Ok(()),
            };
        }
        let take = match take {
            Take::Matching([Part::Paths(glob), ..]) => Take::Below { glob, from: below("").len() },
            other => other,
        };
        let real = fs::canonicalize(&path).map_err(|e| Error::io(&path, e))?;
        if self.above.contains(&real) {
            return Ok(());
        }
        self.above.push(real);
        for entry in fs::read_dir(&path).map_err(|e| Error::io(&path, e))? {
            self.entry(&entry.map_err(|e| Error::io(&path, e))?, below, take)?;
        }
        self.above.pop();
        Ok(())
    }

    fn entry(&mut self, entry: &fs::DirEntry, below: impl Fn(&str) -> String, take: Take<'_>) -> Result<()> {
        let name = entry.file_name();
        // A name that is not UTF-8 has no URI; here it only serves to say so.
        let shown = name.to_string_lossy();
        let uri = below(&shown);
        let matches = match take {
            Take::All => true,
            Take::Matching([Part::Names(glob), ..]) => glob.is_match(&*shown),
            Take::Matching(_) => false,
            Take::Below { glob, from } => glob.is_match(&uri[from..]),
        };
        let may_hold_matches = matches || matches!(take, Take::Below { .. });
        if shown.starts_with('.') || !may_hold_matches {
            return Ok(());
        }
        let metadata = match fs::metadata(entry.path()) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                if matches {
                    self.skipped.push(Skipped { name: uri, reason: "it is a link that leads nowhere" });
                }
                return Ok(());
            }
            other => other.map_err(|e| Error::io(entry.path(), e))?,
        };
        if name.to_str().is_none() {
            self.skipped.push(Skipped { name: uri, reason: "its name is not UTF-8" });
            return Ok(());
        }
        if metadata.is_dir() {
            return match take {
                Take::Matching([_, rest @ ..]) if !rest.is_empty() => self.directory(&uri, Take::Matching(rest)),
                Take::Below { .. } if !matches => self.directory(&uri, take),
                _ => self.directory(&uri, Take::All),
            };
        }
        let last = !matches!(take, Take::Matching([_, _, ..]));
        if matches && last && metadata.is_file() {
            self.files.push(uri);
        }
        Ok(())
    }
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

    fn skipped(paths: &[&str], base: &Path) -> Vec<String> {
        list(&[input(paths)], base).unwrap().skipped.into_iter().map(|s| s.name).collect()
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
        assert_eq!(skipped(&["b"], base), ["b/README"]);
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
    fn a_pattern_reads_only_directories_that_can_match() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tree();
        let base = dir.path();
        // A directory that cannot be read stops whoever looks into it.
        let closed = base.join("closed");
        fs::create_dir(&closed).unwrap();
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).unwrap();
        let readable = fs::read_dir(&closed).is_ok();
        assert_eq!(uris(&["b/*.jsonl"], base), ["b/2.jsonl"]);
        assert_eq!(uris(&["*/c/*.gz"], base), ["b/c/x.warc.gz"]);
        assert_eq!(uris(&["[ab]*"], base), ["a.txt", "b/1.jsonl.gz", "b/2.jsonl", "b/c/x.warc.gz"]);
        assert_eq!(uris(&["b/**/x*"], base), ["b/c/x.warc.gz"]);
        if !readable {
            assert!(list(&[input(&["{b/c,d}/*"])], base).is_err());
        }
        assert_eq!(uris(&["b/.hidden/*"], base), ["b/.hidden/y.jsonl"]);
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(uris(&["{b/c,d}/*"], base), ["b/c/x.warc.gz"]);
    }

    #[test]
    fn names_that_cannot_be_written_and_links_to_nothing_are_left_out_and_told() {
        use std::os::unix::ffi::OsStrExt;
        let dir = tree();
        let base = dir.path();
        std::os::unix::fs::symlink("nowhere", base.join("b/gone.jsonl")).unwrap();
        fs::write(base.join("b").join(std::ffi::OsStr::from_bytes(b"latin\xe9.jsonl")), "x").unwrap();
        assert_eq!(uris(&["b/*.jsonl"], base), ["b/2.jsonl"]);
        let mut left_out = skipped(&["b"], base);
        left_out.sort();
        assert_eq!(left_out, ["b/README", "b/gone.jsonl", "b/latin\u{fffd}.jsonl"]);
        // Of no interest to a pattern that they do not match.
        assert!(skipped(&["b/*.gz"], base).is_empty());
    }

    #[test]
    fn one_file_under_two_spellings_is_taken_once() {
        let dir = tree();
        let base = dir.path();
        std::os::unix::fs::symlink("2.jsonl", base.join("b/3.jsonl")).unwrap();
        assert_eq!(uris(&["b/2.jsonl", "b/../b/2.jsonl", "b/c/../3.jsonl"], base), ["b/../b/2.jsonl"]);
        assert_eq!(skipped(&["b/*.jsonl"], base), ["b/3.jsonl"]);
        let twice = list(&[input(&["b/2.jsonl"]), input(&["b/c/../2.jsonl"])], base).unwrap_err().to_string();
        assert!(twice.contains("belongs to two inputs"), "{twice}");
    }

    #[test]
    fn what_is_not_there_is_named() {
        let dir = tree();
        let error = |paths: &[&str]| list(&[input(paths)], dir.path()).unwrap_err().to_string();
        assert!(error(&["nope.txt"]).contains("ingest.inputs.0.paths: \"nope.txt\" does not exist"));
        assert!(error(&["b/*.nope"]).contains("\"b/*.nope\" matches no file"));
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
