//! Where a directory of a run lies.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use object_store::{ObjectStore, ObjectStoreScheme};
use pipeline::{Manifest, Shard, StageState};
use url::Url;

use super::index::Listed;
use super::storage::{Remote, Storage};
use super::{JOURNAL, Loader, LoaderConfig, journal_entries, listed};
use crate::error::{Error, Result};

/// Beginnings of the names of the environment's variables that hold credentials and settings of object stores.
const VARIABLES: [&str; 3] = ["aws_", "azure_", "google_"];

/// A directory of a run, or the run's own: on a local disk, or copied as it is to an object store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// A local directory.
    Directory(PathBuf),
    /// A URL that ends in the name of the directory.
    Url(Url),
}

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Directory(path) => path.display().fmt(f),
            Self::Url(url) => url.fmt(f),
        }
    }
}

impl Location {
    /// Of a URL such as `https://host/runs/web`, `s3://bucket/runs/web` or `file:///disk/runs/web`: web servers,
    /// Amazon S3 and what speaks its protocol (`s3:`), Google Cloud Storage (`gs:`), Azure (`az:`, `abfs:`, `abfss:`)
    /// and local disks. Credentials and settings come from the environment of the process, from the variables that
    /// the tools of these clouds read (`AWS_*`, `GOOGLE_*`, `AZURE_*`). Nothing is read yet.
    ///
    /// # Errors
    /// If it is no URL, or one that no store here answers.
    pub fn of_url(text: &str) -> Result<Self> {
        let fault = |reason: String| Error::Loader(format!("{text}: {reason}"));
        let url = Url::parse(text).map_err(|e| fault(format!("{e}; write it as https://host/path or file:///path")))?;
        if url.query().is_some() || url.fragment().is_some() {
            return Err(fault("files are looked for below it: it cannot have a query or a fragment".into()));
        }
        if url.scheme() == "file" {
            let path = url.to_file_path().map_err(|()| fault("it names no local directory".into()))?;
            return Ok(Self::Directory(path));
        }
        store(&url)?;
        Ok(Self::Url(url))
    }

    /// What is called `name` in it.
    pub fn join(&self, name: &str) -> Self {
        match self {
            Self::Directory(path) => Self::Directory(path.join(name)),
            Self::Url(url) => {
                let mut url = url.clone();
                if let Ok(mut segments) = url.path_segments_mut() {
                    segments.pop_if_empty().extend(name.split('/'));
                }
                Self::Url(url)
            }
        }
    }

    /// The bytes of a file that lies here.
    pub fn read(&self) -> Result<Bytes> {
        match self {
            Self::Directory(path) => std::fs::read(path).map(Bytes::from).map_err(|e| Error::io(path, e)),
            Self::Url(url) => {
                let (store, path) = store(url)?;
                let read = Remote::new(store, 0).and_then(|remote| remote.read_whole(&path));
                read.map_err(|e| Error::io(url.as_str(), e))
            }
        }
    }

    /// The manifest of the stage in this directory, which has to be done.
    pub fn manifest(&self) -> Result<Manifest> {
        let path = self.join("manifest.json");
        let manifest: Manifest = serde_json::from_slice(&path.read()?).map_err(|e| path.fault(e.to_string()))?;
        match manifest.state {
            StageState::Done => Ok(manifest),
            _ => Err(self.fault(format!("its stage {} is not done: finish its run first", manifest.stage))),
        }
    }

    /// The shards of the stage in this directory, in order; the stage has to be done.
    pub fn shards(&self) -> Result<Vec<Shard>> {
        Ok(self.listed()?.into_iter().map(|listed| listed.shard).collect())
    }

    fn listed(&self) -> Result<Vec<Listed>> {
        let promised = self.manifest()?.tasks as usize;
        let journal = self.join(JOURNAL);
        let entries = journal_entries(Path::new(&journal.to_string()), &journal.read()?)?;
        if entries.len() != promised {
            return Err(journal.fault(format!("it has {} tasks, the manifest promises {promised}", entries.len())));
        }
        Ok(match self {
            Self::Directory(path) => listed(entries, path),
            Self::Url(url) => listed(entries, Path::new(&store(url)?.1.to_string())),
        })
    }

    /// A loader of the token shards of the stage in this directory.
    pub fn loader(&self, config: LoaderConfig) -> Result<Loader> {
        let shards = self.listed()?;
        match self {
            Self::Directory(_) => Loader::with_storage(&shards, config, Storage::Local),
            Self::Url(url) => {
                let remote = Remote::new(store(url)?.0, config.buffers.cache_bytes);
                let remote = remote.map_err(|e| Error::io(url.as_str(), e))?;
                Loader::with_storage(&shards, config, Storage::Remote(remote))
            }
        }
    }

    fn fault(&self, reason: String) -> Error {
        Error::Shard { path: self.to_string().into(), row_group: None, reason }
    }
}

/// The store that a URL names, and the place in it. A new one each time: its connections belong to whoever
/// asks first.
fn store(url: &Url) -> Result<(Arc<dyn ObjectStore>, object_store::path::Path)> {
    let variables = std::env::vars_os().filter_map(|(name, value)| {
        let name = name.into_string().ok()?.to_ascii_lowercase();
        let known = VARIABLES.iter().any(|beginning| name.starts_with(beginning));
        Some((name, value.into_string().ok()?)).filter(|_| known)
    });
    let mut options: Vec<(String, String)> = variables.collect();
    // Who writes http: means it.
    options.extend((url.scheme() == "http").then(|| ("allow_http".into(), "true".into())));
    let fault = |reason: String| Error::Loader(format!("{url}: {reason}"));
    ObjectStoreScheme::parse(url).map_err(|e| {
        fault(format!(
            "{e}; URLs begin with https:, http:, s3:, gs:, az:, abfs:, abfss: or file: and name what lies there"
        ))
    })?;
    let (store, path) = object_store::parse_url_opts(url, options).map_err(|e| {
        fault(format!("{e}; accounts, keys and regions are taken from the environment: AWS_*, GOOGLE_*, AZURE_*"))
    })?;
    Ok((Arc::from(store), path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_a_url_that_something_answers() {
        let of = |text: &str| Location::of_url(text).unwrap();
        assert_eq!(of("file:///a/b%20c").join("tokens"), Location::Directory("/a/b c/tokens".into()));
        assert_eq!(of("https://host/runs/web").join("tokens").to_string(), "https://host/runs/web/tokens");
        assert_eq!(of("http://host:81/runs/web/").join("a/b").to_string(), "http://host:81/runs/web/a/b");
        // No request is made: a bucket that is not there is told by whoever reads.
        assert_eq!(of("s3://bucket/runs").join("tokens").to_string(), "s3://bucket/runs/tokens");
        assert_eq!(store(&Url::parse("s3://bucket/runs/web").unwrap()).unwrap().1.as_ref(), "runs/web");
        let refused = |text: &str| Location::of_url(text).unwrap_err().to_string();
        assert!(refused("runs/web").contains("file:///path"));
        assert!(refused("https://host/runs?key=1").contains("query"));
        let ftp = refused("ftp://host/runs");
        assert!(ftp.contains("ftp://host/runs") && ftp.contains("s3:") && ftp.contains("az:"), "{ftp}");
    }
}
