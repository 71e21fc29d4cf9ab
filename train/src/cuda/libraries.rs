//! The CUDA libraries and headers of this machine: where they are, their versions, what lacks.
//!
//! Libraries are loaded at run time. Those that the loader does not find by name are looked for
//! where toolkits and the wheels of `pip` put them, and loaded from there: the bindings that ask
//! for them by name later get the one that is in the process already.

use std::env;
use std::ffi::{OsStr, c_int};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::Library as Handle;

use super::Error;

/// One library, found or not.
#[derive(Debug)]
pub struct Library {
    /// Its name without prefix and suffix, such as `nvrtc`.
    pub name: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// The file it was loaded from (the bare name when the loader found it) and its version, or
    /// what to do.
    pub found: Result<Found, String>,
}

/// A library or the headers where they were found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The file, or the directory of the headers.
    pub path: PathBuf,
    /// Such as `13.0.88`.
    pub version: String,
}

/// Everything CUDA needs on this machine.
#[derive(Debug)]
pub struct Libraries {
    /// The driver's own library, `libcuda`; the version is the newest CUDA that it serves.
    pub driver: Library,
    /// The run-time compiler, `libnvrtc`.
    pub compiler: Library,
    /// Matrix products, `libcublasLt`.
    pub products: Library,
    /// Collectives over GPUs, `libnccl`; one GPU does without.
    pub collectives: Library,
    /// Directory with `cuda_bf16.h`, for the kernels that include CUDA's headers.
    pub headers: Result<Found, String>,
}

impl Libraries {
    /// All libraries, in the order a user would install them.
    pub fn all(&self) -> [&Library; 4] {
        [&self.driver, &self.compiler, &self.products, &self.collectives]
    }
}

/// How the version of a library is asked for and written.
struct Kind {
    name: &'static str,
    purpose: &'static str,
    /// File names in the order of preference; the first is what the bindings look for.
    files: &'static [&'static str],
    /// Directory of the older wheels, which had one for every library.
    wheel: &'static str,
    package: &'static str,
    version: fn(&Handle) -> Option<String>,
}

const DRIVER: Kind = Kind {
    name: "cuda",
    purpose: "the driver",
    files: &["libcuda.so.1", "libcuda.so"],
    wheel: "",
    package: "the NVIDIA driver",
    version: |library| one_number(library, b"cuDriverGetVersion").map(|v| format!("{}.{}", v / 1000, v % 1000 / 10)),
};

const COMPILER: Kind = Kind {
    name: "nvrtc",
    purpose: "compiles kernels at run time",
    files: &["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"],
    wheel: "cuda_nvrtc",
    package: "the CUDA toolkit, or `pip install nvidia-cuda-nvrtc`",
    version: |library| {
        let (mut major, mut minor): (c_int, c_int) = (0, 0);
        // SAFETY: the function of this name in every libnvrtc has this type.
        unsafe {
            let ask: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int = *library.get(b"nvrtcVersion").ok()?;
            (ask(&mut major, &mut minor) == 0).then(|| format!("{major}.{minor}"))
        }
    },
};

const PRODUCTS: Kind = Kind {
    name: "cublasLt",
    purpose: "matrix products",
    files: &["libcublasLt.so", "libcublasLt.so.13", "libcublasLt.so.12"],
    wheel: "cublas",
    package: "the CUDA toolkit, or `pip install nvidia-cublas`",
    version: |library| {
        // SAFETY: the function of this name in every libcublasLt has this type.
        let version = unsafe {
            let ask: unsafe extern "C" fn() -> usize = *library.get(b"cublasLtGetVersion").ok()?;
            ask()
        };
        Some(three_parts(version))
    },
};

const COLLECTIVES: Kind = Kind {
    name: "nccl",
    purpose: "collectives over several GPUs",
    files: &["libnccl.so.2", "libnccl.so"],
    wheel: "nccl",
    package: "NCCL, or `pip install nvidia-nccl-cu13`",
    version: |library| one_number(library, b"ncclGetVersion").map(|v| three_parts(v as usize)),
};

/// The version written by a function that takes a pointer to one integer.
fn one_number(library: &Handle, symbol: &[u8]) -> Option<c_int> {
    let mut version: c_int = 0;
    // SAFETY: both functions asked for so have this type in every version of their library.
    unsafe {
        let ask: unsafe extern "C" fn(*mut c_int) -> c_int = *library.get(symbol).ok()?;
        (ask(&mut version) == 0).then_some(version)
    }
}

fn three_parts(version: usize) -> String {
    format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100)
}

/// What this machine has. Looked for once in a process; the libraries stay loaded.
pub fn find() -> &'static Libraries {
    static FOUND: OnceLock<Libraries> = OnceLock::new();
    FOUND.get_or_init(|| {
        let roots = roots();
        let load = |kind: &Kind| Library { name: kind.name, purpose: kind.purpose, found: load(kind, &roots) };
        Libraries {
            driver: load(&DRIVER),
            compiler: load(&COMPILER),
            products: load(&PRODUCTS),
            collectives: load(&COLLECTIVES),
            headers: headers(&roots),
        }
    })
}

/// Checks for the libraries that training on a GPU cannot do without.
///
/// # Errors
/// [`Error::Missing`] names the first that lacks and says what to install.
pub fn require() -> Result<&'static Libraries, Error> {
    let libraries = find();
    for library in [&libraries.driver, &libraries.compiler, &libraries.products] {
        if let Err(advice) = &library.found {
            return Err(Error::Missing(advice.clone()));
        }
    }
    Ok(libraries)
}

fn load(kind: &Kind, roots: &[PathBuf]) -> Result<Found, String> {
    let names = kind.files.iter().map(PathBuf::from);
    let places = roots.iter().flat_map(|root| directories(root, kind.wheel));
    let paths = places.flat_map(|place| kind.files.iter().map(move |file| place.join(file)));
    let mut refused = None;
    for path in names.chain(paths.filter(|path| path.exists())) {
        if let (true, Some(directory)) = (path.is_absolute(), path.parent()) {
            load_parts(directory, kind);
        }
        // SAFETY: loading a library of the vendor runs its own initialisers and nothing else.
        match unsafe { Handle::new(&path) } {
            Ok(library) => {
                let version = (kind.version)(&library).unwrap_or_else(|| "of unknown version".to_owned());
                // It stays: functions of it are in use until the process ends.
                std::mem::forget(library);
                return Ok(Found { path, version });
            }
            Err(error) if path.is_absolute() => refused = Some(format!("{} cannot be loaded: {error}", path.display())),
            Err(_) => {}
        }
    }
    Err(refused
        .unwrap_or_else(|| format!("lib{} is not there ({}): install {}", kind.name, kind.purpose, kind.package)))
}

/// NVRTC loads a library of its own by name, which is beside it.
fn load_parts(directory: &Path, kind: &Kind) {
    let prefix = format!("lib{}-builtins.so", kind.name);
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(&prefix)) {
            // SAFETY: a library of the vendor without initialisers of effect.
            let part = unsafe { Handle::new(entry.path()) };
            part.map_or_else(|error| tracing::debug!("{}: {error}", entry.path().display()), std::mem::forget);
        }
    }
}

/// Directories that may hold a toolkit or wheels: what the user named first.
fn roots() -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> =
        ["CUDA_PATH", "CUDA_HOME"].into_iter().filter_map(env::var_os).map(PathBuf::from).collect();
    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let home = env::var_os("HOME").map(|home| PathBuf::from(home).join(".local"));
    for environment in environments.chain(home).chain(["/usr/local".into(), "/usr".into()]) {
        roots.extend(wheels(&environment.join("lib")));
    }
    roots.extend(["/usr/local/cuda", "/opt/cuda"].map(PathBuf::from));
    roots
}

/// The `nvidia` directories below `python3*/{site,dist}-packages` of `lib`, newest Python first.
fn wheels(lib: &Path) -> Vec<PathBuf> {
    let pythons = fs::read_dir(lib).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_python = |path: &PathBuf| path.file_name().and_then(OsStr::to_str).is_some_and(|n| n.starts_with("python3"));
    let mut pythons: Vec<PathBuf> = pythons.filter(is_python).collect();
    pythons.sort();
    let packages = pythons.into_iter().rev().flat_map(|p| ["site-packages", "dist-packages"].map(|dir| p.join(dir)));
    packages.map(|dir| dir.join("nvidia")).filter(|dir| dir.is_dir()).collect()
}

/// Where below `root` libraries are: a toolkit, the wheels of CUDA 13, and the wheels before it.
fn directories(root: &Path, wheel: &str) -> Vec<PathBuf> {
    let mut places = vec![root.join("lib64"), root.join("lib"), root.join("cu13/lib")];
    if !wheel.is_empty() {
        places.push(root.join(wheel).join("lib"));
    }
    places
}

fn headers(roots: &[PathBuf]) -> Result<Found, String> {
    let places =
        roots.iter().flat_map(|root| ["include", "cu13/include", "cuda_runtime/include"].map(|at| root.join(at)));
    let version = |place: &Path| {
        let text = fs::read_to_string(place.join("cuda.h")).ok()?;
        let number = text.lines().find_map(|line| line.strip_prefix("#define CUDA_VERSION "))?;
        let number: u32 = number.trim().parse().ok()?;
        Some(format!("{}.{}", number / 1000, number % 1000 / 10))
    };
    if let Some(path) = places.into_iter().find(|place| place.join("cuda_bf16.h").exists()) {
        let version = version(&path).unwrap_or_else(|| "of unknown version".to_owned());
        return Ok(Found { path, version });
    }
    Err("CUDA's headers (cuda_bf16.h) are not there: install the CUDA toolkit, or \
         `pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl`, and let CUDA_PATH name the \
         directory that holds `include`"
        .to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wheels_and_toolkits_are_looked_through() {
        let directory = tempfile::tempdir().unwrap();
        let nvidia = directory.path().join("lib/python3.11/site-packages/nvidia");
        fs::create_dir_all(nvidia.join("cu13/include")).unwrap();
        assert_eq!(wheels(&directory.path().join("lib")), std::slice::from_ref(&nvidia));
        assert!(directories(&nvidia, "cublas").contains(&nvidia.join("cu13/lib")));
        assert!(directories(&nvidia, "cublas").contains(&nvidia.join("cublas/lib")));

        let missing = headers(std::slice::from_ref(&nvidia)).unwrap_err();
        assert!(missing.contains("cuda_bf16.h") && missing.contains("CUDA_PATH"), "{missing}");
        fs::write(nvidia.join("cu13/include/cuda_bf16.h"), "").unwrap();
        fs::write(nvidia.join("cu13/include/cuda.h"), "// x\n#define CUDA_VERSION 13000\n").unwrap();
        let found = headers(std::slice::from_ref(&nvidia)).unwrap();
        assert_eq!(found, Found { path: nvidia.join("cu13/include"), version: "13.0".to_owned() });
    }

    #[test]
    fn what_is_not_there_is_named_with_what_to_install() {
        let nowhere = Kind { files: &["libfulgurite_has_no_such_library.so"], ..PRODUCTS };
        let error = load(&nowhere, &[]).unwrap_err();
        assert!(error.contains("libcublasLt is not there") && error.contains("pip install nvidia-cublas"), "{error}");
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("lib")).unwrap();
        let broken = directory.path().join("lib/libfulgurite_has_no_such_library.so");
        fs::write(&broken, "not a library").unwrap();
        let error = load(&nowhere, &[directory.path().to_owned()]).unwrap_err();
        assert!(error.contains(&broken.display().to_string()) && error.contains("cannot be loaded"), "{error}");
    }

    #[test]
    fn versions_are_written_as_the_vendor_writes_them() {
        assert_eq!(three_parts(22_809), "2.28.9");
        assert_eq!(three_parts(130_100), "13.1.0");
    }
}
