//! Named float tensors in safetensors files, and a model's parameters among them.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata, SafeTensorError, View};

use crate::Error;
use crate::parameters::{Parameter, ParameterList};

/// One float32 tensor to be written.
struct Float32<'a> {
    shape: &'a [usize],
    bytes: Cow<'a, [u8]>,
}

impl View for Float32<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Little-endian bytes of `values`: a copy only on a big-endian machine.
pub(crate) fn bytes(values: &[f32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "big") {
        return values.iter().flat_map(|value| value.to_le_bytes()).collect();
    }
    // SAFETY: every byte of a float32 is initialised and bytes have no alignment.
    Cow::Borrowed(unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) })
}

/// The values whose little-endian bytes these are; a rest of less than four bytes is left out.
pub(crate) fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect()
}

/// Writes flat buffers laid out as `parameters` says, each with a prefix, as one tensor per
/// parameter and buffer.
pub(crate) fn write(path: &Path, parameters: &ParameterList, buffers: &[(&str, &[f32])]) -> Result<(), Error> {
    let tensors = buffers.iter().flat_map(|(prefix, flat)| {
        parameters.iter().map(move |parameter| {
            let bytes = bytes(&flat[parameter.range()]);
            let tensor = Float32 { shape: &parameter.shape, bytes };
            (format!("{prefix}{}", parameter.name), tensor)
        })
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    // `safetensors` writes through a temporary file that nobody but its owner may read, which is not what a user's
    // other files are like: the permissions of a new file are learnt first and set last.
    let permissions = File::create(path).and_then(|file| file.metadata()).map_err(Error::io(path))?.permissions();
    safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(|error| match error {
        SafeTensorError::IoError(source) => Error::io(path)(source),
        other => Error::format(path, other),
    })?;
    fs::set_permissions(path, permissions).map_err(Error::io(path))
}

/// Bytes that are read at once: a file of tensors may be as large as the memory that its values take.
const PIECE_BYTES: usize = 1 << 22;

/// Reads what [`write`] wrote: a flat buffer for every prefix, from a file that holds their tensors
/// and nothing else, in float32, float16 or bfloat16.
pub(crate) fn read<const N: usize>(
    path: &Path,
    parameters: &ParameterList,
    prefixes: [&str; N],
) -> Result<[Vec<f32>; N], Error> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let (begin, head) = head(&mut file, path)?;
    for name in head.offset_keys() {
        let known = |parameter: &Parameter| {
            let prefix = name.strip_suffix(&parameter.name);
            prefix.is_some_and(|prefix| prefixes.contains(&prefix))
        };
        if !parameters.iter().any(known) {
            let reason = format!("the model has no place for the tensor {name}");
            return Err(Error::format(path, reason));
        }
    }
    let mut buffers = prefixes.map(|_| vec![0f32; parameters.total()]);
    let mut piece = vec![0; PIECE_BYTES];
    for (prefix, flat) in prefixes.iter().zip(&mut buffers) {
        for parameter in parameters.iter() {
            let name = format!("{prefix}{}", parameter.name);
            let tensor =
                head.info(&name).ok_or_else(|| Error::format(path, format!("the tensor {name} is missing")))?;
            if tensor.shape != parameter.shape {
                let reason =
                    format!("the tensor {name} is {:?}, the configuration says {:?}", tensor.shape, parameter.shape);
                return Err(Error::format(path, reason));
            }
            let width = match tensor.dtype {
                Dtype::F32 => 4,
                Dtype::F16 | Dtype::BF16 => 2,
                other => {
                    let reason = format!("the tensor {name} has the type {other:?}, not a float");
                    return Err(Error::format(path, reason));
                }
            };
            file.seek(SeekFrom::Start(begin + tensor.data_offsets.0 as u64)).map_err(Error::io(path))?;
            for to in flat[parameter.range()].chunks_mut(PIECE_BYTES / 4) {
                let bytes = &mut piece[..to.len() * width];
                file.read_exact(bytes).map_err(Error::io(path))?;
                let to = to.iter_mut();
                match tensor.dtype {
                    Dtype::F16 => {
                        to.zip(bytes.as_chunks::<2>().0).for_each(|(to, x)| *to = f16::from_le_bytes(*x).to_f32());
                    }
                    Dtype::BF16 => {
                        to.zip(bytes.as_chunks::<2>().0).for_each(|(to, x)| *to = bf16::from_le_bytes(*x).to_f32());
                    }
                    _ => to.zip(bytes.as_chunks::<4>().0).for_each(|(to, x)| *to = f32::from_le_bytes(*x)),
                }
            }
        }
    }
    Ok(buffers)
}

/// Where the values of a file begin, and what it says of its tensors.
fn head(file: &mut File, path: &Path) -> Result<(u64, Metadata), Error> {
    /// Longest head, that of the format's own library.
    const MOST_BYTES: u64 = 100_000_000;
    let file_bytes = file.metadata().map_err(Error::io(path))?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|error| Error::format(path, format!("it has no head: {error}")))?;
    let length = u64::from_le_bytes(length);
    if length > MOST_BYTES || length + 8 > file_bytes {
        let reason = format!("its head says it takes {length} bytes, the file has {file_bytes}");
        return Err(Error::format(path, reason));
    }
    let mut text = vec![0; length as usize];
    file.read_exact(&mut text).map_err(Error::io(path))?;
    // Checks on the way that the tensors lie one after the other.
    let head: Metadata = serde_json::from_slice(&text).map_err(|error| Error::format(path, error))?;
    let (held, told) = (file_bytes - 8 - length, head.data_len() as u64);
    if held != told {
        return Err(Error::format(path, format!("it has {held} bytes of values, its head says {told}")));
    }
    Ok((8 + length, head))
}
