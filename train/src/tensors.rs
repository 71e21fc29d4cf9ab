//! Named float tensors in safetensors files, and a model's parameters among them.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, View};

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
fn bytes(values: &[f32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "big") {
        return values.iter().flat_map(|value| value.to_le_bytes()).collect();
    }
    // SAFETY: every byte of a float32 is initialised and bytes have no alignment.
    Cow::Borrowed(unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) })
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
    let permissions = fs::File::create(path).and_then(|file| file.metadata()).map_err(Error::io(path))?.permissions();
    safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(|error| match error {
        SafeTensorError::IoError(source) => Error::io(path)(source),
        other => Error::format(path, other),
    })?;
    fs::set_permissions(path, permissions).map_err(Error::io(path))
}

/// Reads what [`write`] wrote: a flat buffer for every prefix, from a file that holds their tensors
/// and nothing else, in float32, float16 or bfloat16.
pub(crate) fn read<const N: usize>(
    path: &Path,
    parameters: &ParameterList,
    prefixes: [&str; N],
) -> Result<[Vec<f32>; N], Error> {
    let content = fs::read(path).map_err(Error::io(path))?;
    let tensors = SafeTensors::deserialize(&content).map_err(|error| Error::format(path, error))?;
    for name in tensors.names() {
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
    for (prefix, flat) in prefixes.iter().zip(&mut buffers) {
        for parameter in parameters.iter() {
            let name = format!("{prefix}{}", parameter.name);
            let tensor =
                tensors.tensor(&name).map_err(|_| Error::format(path, format!("the tensor {name} is missing")))?;
            if tensor.shape() != parameter.shape {
                let reason =
                    format!("the tensor {name} is {:?}, the configuration says {:?}", tensor.shape(), parameter.shape);
                return Err(Error::format(path, reason));
            }
            let to = flat[parameter.range()].iter_mut();
            match tensor.dtype() {
                Dtype::F32 => {
                    to.zip(tensor.data().as_chunks::<4>().0).for_each(|(to, &bytes)| *to = f32::from_le_bytes(bytes))
                }
                Dtype::F16 => to
                    .zip(tensor.data().as_chunks::<2>().0)
                    .for_each(|(to, &bytes)| *to = f16::from_le_bytes(bytes).to_f32()),
                Dtype::BF16 => to
                    .zip(tensor.data().as_chunks::<2>().0)
                    .for_each(|(to, &bytes)| *to = bf16::from_le_bytes(bytes).to_f32()),
                other => {
                    let reason = format!("the tensor {name} has the type {other:?}, not a float");
                    return Err(Error::format(path, reason));
                }
            }
        }
    }
    Ok(buffers)
}
