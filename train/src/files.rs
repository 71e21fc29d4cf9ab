//! Files that are either whole or not there.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::Error;

/// `path` with `.partial` after its name: where a file or directory is built.
pub(crate) fn partial(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".partial");
    name.into()
}

/// Makes the content and the name of `path` durable.
pub(crate) fn sync(path: &Path) -> Result<(), Error> {
    let file = File::open(path).map_err(Error::io(path))?;
    file.sync_all().map_err(Error::io(path))
}

/// Has `write` make a file beside `path`, makes it durable and gives it its name.
pub(crate) fn replace(path: &Path, write: impl FnOnce(&Path) -> Result<(), Error>) -> Result<(), Error> {
    let partial = partial(path);
    write(&partial)?;
    sync(&partial)?;
    fs::rename(&partial, path).map_err(Error::io(path))?;
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync(parent),
        _ => Ok(()),
    }
}
