//! CUDA C++ to machine code: NVRTC, and the machine code kept on disk.
//!
//! A cubin is named by the XXH3 of all that it depends on: source, headers, options and the version
//! of the compiler. Files appear under their name when they are whole, and end with a checksum, so
//! that processes may share the directory and a damaged file is compiled again.

use std::env;
use std::ffi::{CStr, CString, c_char};
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use cudarc::nvrtc::sys;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use super::{Error, libraries};

/// The text of one `.cu` file, embedded in the program.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// The file's name, for messages.
    pub name: &'static str,
    /// Its text. It may include `common.cuh` and CUDA's own headers.
    pub text: &'static str,
}

/// Headers of our own that a source may include.
const HEADERS: [(&CStr, &str); 1] = [(c"common.cuh", include_str!("../kernels/common.cuh"))];

/// The GPU that code is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Architecture {
    /// Compute capability times ten: 90 for Hopper.
    pub version: u32,
}

impl Architecture {
    /// The architecture of a compute capability.
    pub fn new(major: u32, minor: u32) -> Self {
        Self { version: 10 * major + minor }
    }
}

impl fmt::Display for Architecture {
    /// `sm_90a` with Hopper's own instructions, elsewhere the plain form.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let own = if self.version == 90 { "a" } else { "" };
        write!(f, "sm_{}{own}", self.version)
    }
}

/// Values of macros that specialise a source.
pub(super) type Defines = Vec<(&'static str, i64)>;

fn options(defines: &[(&'static str, i64)], architecture: Architecture) -> Vec<String> {
    let mut options =
        vec![format!("--gpu-architecture={architecture}"), "--std=c++17".to_owned(), "-lineinfo".to_owned()];
    options.extend(defines.iter().map(|(name, value)| format!("-D{name}={value}")));
    if let Ok(headers) = &libraries::find().headers {
        options.push(format!("--include-path={}", headers.path.display()));
        // Where the toolkit keeps the C++ core libraries since CUDA 13.
        options.push(format!("--include-path={}", headers.path.join("cccl").display()));
    }
    options
}

/// The machine code of `source` for `architecture`, from disk where it was compiled before.
///
/// # Errors
/// [`Error::Missing`] without NVRTC, [`Error::Compile`] with the compiler's log. A cache that cannot
/// be written is no error.
pub(super) fn cached(
    source: &Source,
    defines: &[(&'static str, i64)],
    architecture: Architecture,
) -> Result<Vec<u8>, Error> {
    let compiler = compiler()?;
    let options = options(defines, architecture);
    let mut key = Xxh3::new();
    let headers = HEADERS.iter().map(|(_, text)| *text);
    for part in headers.chain([source.text, &compiler.version]).chain(options.iter().map(String::as_str)) {
        key.update(&(part.len() as u64).to_le_bytes());
        key.update(part.as_bytes());
    }
    let stem = source.name.trim_end_matches(".cu");
    let path = cache().map(|directory| directory.join(format!("{stem}-{architecture}-{:032x}.cubin", key.digest128())));
    if let Some(cubin) = path.as_ref().and_then(|path| fs::read(path).ok()).and_then(unseal) {
        return Ok(cubin);
    }
    let cubin = nvrtc(source, &options, architecture)?;
    if let Some(path) = path {
        keep(&path, &cubin);
    }
    Ok(cubin)
}

/// [`cached`] without the cache.
pub(super) fn anew(
    source: &Source,
    defines: &[(&'static str, i64)],
    architecture: Architecture,
) -> Result<Vec<u8>, Error> {
    compiler()?;
    nvrtc(source, &options(defines, architecture), architecture)
}

/// The bindings panic without their library: nothing is called before this.
fn compiler() -> Result<&'static libraries::Found, Error> {
    let found = libraries::find().compiler.found.as_ref();
    found.map_err(|advice| Error::Missing(advice.clone()))
}

/// Where cubins are kept: below the user's cache directory.
fn cache() -> Option<PathBuf> {
    let named = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let user = named("XDG_CACHE_HOME").or_else(|| named("HOME").map(|home| home.join(".cache")));
    user.map(|cache| cache.join("fulgurite/kernels"))
}

/// Bytes of the checksum at the end of a kept cubin.
const SEAL: usize = 16;

fn unseal(mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    let length = bytes.len().checked_sub(SEAL)?;
    let intact = xxh3_128(&bytes[..length]).to_le_bytes() == bytes[length..];
    bytes.truncate(length);
    intact.then_some(bytes)
}

/// Keeps a cubin for the next process. Without a place to keep it, it is compiled again.
fn keep(path: &std::path::Path, cubin: &[u8]) {
    let sealed = [cubin, &xxh3_128(cubin).to_le_bytes()].concat();
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = path.parent().map_or(Ok(()), fs::create_dir_all);
    let written = written.and_then(|()| fs::write(&temporary, sealed)).and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = written {
        tracing::debug!("{} is not kept: {error}", path.display());
        let _ = fs::remove_file(&temporary);
    }
}

fn nvrtc(source: &Source, options: &[String], architecture: Architecture) -> Result<Vec<u8>, Error> {
    static HEADER_TEXTS: OnceLock<Vec<CString>> = OnceLock::new();
    let text = |text: &str| CString::new(text).map_err(|error| Error::call(source.name, error));
    let header_texts = HEADER_TEXTS.get_or_init(|| {
        HEADERS
            .iter()
            .map(|(_, text)| CString::new(*text).unwrap_or_else(|_| unreachable!("text without zeros")))
            .collect()
    });
    let header_texts: Vec<*const c_char> = header_texts.iter().map(|text| text.as_ptr()).collect();
    let header_names: Vec<*const c_char> = HEADERS.iter().map(|(name, _)| name.as_ptr()).collect();
    let (name, program_text) = (text(source.name)?, text(source.text)?);
    let options: Vec<CString> = options.iter().map(|option| text(option)).collect::<Result<_, _>>()?;
    let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    let check = |call: &str, result: sys::nvrtcResult| {
        result.result().map_err(|error| Error::call(format!("{call} of {}", source.name), error))
    };
    // SAFETY: every pointer addresses what outlives the program, sizes are asked for before a buffer
    // is filled, and the library is there: its version was read.
    unsafe {
        let mut program = std::ptr::null_mut();
        check(
            "nvrtcCreateProgram",
            sys::nvrtcCreateProgram(
                &mut program,
                program_text.as_ptr(),
                name.as_ptr(),
                HEADERS.len() as i32,
                header_texts.as_ptr(),
                header_names.as_ptr(),
            ),
        )?;
        let program = Program(program);
        if sys::nvrtcCompileProgram(program.0, options.len() as i32, options.as_ptr()).result().is_err() {
            let mut log = program.log();
            if let (true, Err(advice)) = (log.contains("could not open source file"), &libraries::find().headers) {
                log = format!("{advice}\n{log}");
            }
            return Err(Error::Compile { source_name: source.name, architecture: architecture.to_string(), log });
        }
        let mut size = 0;
        check("nvrtcGetCUBINSize", sys::nvrtcGetCUBINSize(program.0, &mut size))?;
        let mut cubin = vec![0u8; size];
        check("nvrtcGetCUBIN", sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast()))?;
        Ok(cubin)
    }
}

/// A program that is destroyed whatever happens.
struct Program(sys::nvrtcProgram);

impl Program {
    fn log(&self) -> String {
        let mut size = 0;
        // SAFETY: the program lives and the buffer has the size that was asked for.
        unsafe {
            if sys::nvrtcGetProgramLogSize(self.0, &mut size).result().is_err() {
                return "without a log".to_owned();
            }
            let mut log = vec![0u8; size];
            let _ = sys::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast());
            String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).to_owned()
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program was created and is destroyed once.
        let _ = unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architectures_are_named_as_nvrtc_names_them() {
        assert_eq!(Architecture::new(9, 0).to_string(), "sm_90a");
        assert_eq!(Architecture::new(8, 6).to_string(), "sm_86");
        assert_eq!(Architecture::new(12, 0).to_string(), "sm_120");
    }

    #[test]
    fn a_damaged_cubin_is_not_taken() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("below/x.cubin");
        keep(&path, b"machine code");
        let kept = fs::read(&path).unwrap();
        assert_eq!(unseal(kept.clone()).unwrap(), b"machine code");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        for at in 0..kept.len() {
            let mut damaged = kept.clone();
            damaged[at] ^= 1;
            assert_eq!(unseal(damaged), None);
            assert_eq!(unseal(kept[..at].to_vec()), None);
        }
    }
}
