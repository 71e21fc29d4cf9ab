//! Named float tensors in safetensors files, and a model's parameters among them.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use crate::Error;
use crate::parameters::{Parameter, ParameterList};

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

/// Where values come from that are written.
pub(crate) trait Values {
    /// The values `range` of the flat buffer.
    fn read(&self, range: Range<usize>) -> Result<Cow<'_, [f32]>, Error>;
}

/// The values of a shard: ranges of the flat buffer, and their values one after the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shard<'a> {
    pub(crate) ranges: &'a [Range<usize>],
    pub(crate) values: &'a [f32],
}

impl Values for Shard<'_> {
    fn read(&self, range: Range<usize>) -> Result<Cow<'_, [f32]>, Error> {
        let mut begin = 0;
        for held in self.ranges {
            if held.start <= range.start && range.end <= held.end {
                let begin = begin + range.start - held.start;
                return Ok(Cow::Borrowed(&self.values[begin..begin + range.len()]));
            }
            begin += held.len();
        }
        unreachable!("only values of the shard are asked for")
    }
}

/// Values that are read or written at once: a file of tensors may be as large as the memory that its values take.
const PIECE: usize = 1 << 20;

/// Marks the name of a part of a parameter, before the number of its first value.
const PART: char = '@';

/// Writes what `buffers` have of the flat buffer, each with a prefix, in float32. A parameter is one tensor where `ranges`,
/// the part of the flat buffer to be written, has all of it; else every part of it in `ranges` is one, of one
/// dimension, with the number of its first value after its name.
pub(crate) fn write(
    path: &Path,
    parameters: &ParameterList,
    ranges: &[Range<usize>],
    buffers: &[(&str, &dyn Values)],
) -> Result<(), Error> {
    struct Tensor<'a> {
        name: String,
        shape: Vec<usize>,
        range: Range<usize>,
        values: &'a dyn Values,
    }
    let mut tensors: Vec<Tensor<'_>> = Vec::new();
    for (prefix, values) in buffers {
        for parameter in parameters.iter() {
            let whole = parameter.range();
            for range in ranges {
                let part = whole.start.max(range.start)..whole.end.min(range.end);
                if part.is_empty() {
                    continue;
                }
                let (name, shape) = match part == whole {
                    true => (format!("{prefix}{}", parameter.name), parameter.shape.clone()),
                    false => {
                        let first = part.start - whole.start;
                        (format!("{prefix}{}{PART}{first}", parameter.name), vec![part.len()])
                    }
                };
                tensors.push(Tensor { name, shape, range: part, values: *values });
            }
        }
    }
    // The order that the format's own library gives them.
    tensors.sort_by(|left, right| left.name.cmp(&right.name));
    let mut offset = 0;
    let head = tensors.iter().map(|tensor| {
        let data_offsets = (offset, offset + 4 * tensor.range.len());
        offset = data_offsets.1;
        (tensor.name.clone(), TensorInfo { dtype: Dtype::F32, shape: tensor.shape.clone(), data_offsets })
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let head = Metadata::new(Some(metadata), head.collect()).map_err(|error| Error::format(path, error))?;
    let mut head = serde_json::to_vec(&head).map_err(|error| Error::format(path, error))?;
    head.resize(head.len().next_multiple_of(8), b' ');

    let file = File::create(path).map_err(Error::io(path))?;
    let mut file = BufWriter::with_capacity(PIECE, file);
    let mut put = |bytes: &[u8]| file.write_all(bytes).map_err(Error::io(path));
    put(&(head.len() as u64).to_le_bytes())?;
    put(&head)?;
    for Tensor { range, values, .. } in tensors {
        for begin in range.clone().step_by(PIECE) {
            put(&bytes(&values.read(begin..range.end.min(begin + PIECE))?))?;
        }
    }
    file.flush().map_err(Error::io(path))
}

/// Flat buffers, one for each of some prefixes, in one file or in the parts that ranks have written.
#[derive(Debug)]
pub(crate) struct Store {
    files: Vec<PathBuf>,
    /// By prefix, in the order of the flat buffer and without gaps.
    parts: Vec<Vec<Part>>,
}

/// Values that lie in one place.
#[derive(Clone, Debug)]
struct Part {
    /// Of the flat buffer.
    range: Range<usize>,
    file: usize,
    /// Of the first value, in bytes from the beginning of the file.
    position: u64,
    dtype: Dtype,
}

impl Store {
    /// Of files that together hold the tensors of `parameters` with these prefixes and nothing else, in float32, float16 or
    /// bfloat16.
    pub(crate) fn open(files: Vec<PathBuf>, parameters: &ParameterList, prefixes: &[&str]) -> Result<Self, Error> {
        let named: HashMap<&str, &Parameter> = parameters.iter().map(|p| (p.name.as_str(), p)).collect();
        let mut parts: Vec<Vec<Part>> = vec![Vec::new(); prefixes.len()];
        for (number, path) in files.iter().enumerate() {
            let mut file = File::open(path).map_err(Error::io(path))?;
            let (begin, head) = head(&mut file, path)?;
            for name in head.offset_keys() {
                let Some(tensor) = head.info(&name) else { continue };
                let (plain, first) = match name.rsplit_once(PART) {
                    Some((plain, first)) => (plain, first.parse().ok()),
                    None => (name.as_str(), None),
                };
                let known = prefixes
                    .iter()
                    .enumerate()
                    .find_map(|(index, prefix)| Some((index, *named.get(plain.strip_prefix(prefix)?)?)));
                let Some((prefix, parameter)) = known else {
                    let reason = format!("the model has no place for the tensor {name}");
                    return Err(Error::format(path, reason));
                };
                let count: usize = tensor.shape.iter().product();
                let whole = parameter.range();
                let fits = match first {
                    None => tensor.shape == parameter.shape,
                    Some(first) => tensor.shape.len() == 1 && whole.len().checked_sub(count) >= Some(first),
                };
                if !fits {
                    let (has, want) = (&tensor.shape, &parameter.shape);
                    let reason = format!("the tensor {name} is {has:?}, the configuration says {want:?}");
                    return Err(Error::format(path, reason));
                }
                if !matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                    let reason = format!("the tensor {name} has the type {:?}, not a float", tensor.dtype);
                    return Err(Error::format(path, reason));
                }
                let start = whole.start + first.unwrap_or(0);
                parts[prefix].push(Part {
                    range: start..start + count,
                    file: number,
                    position: begin + tensor.data_offsets.0 as u64,
                    dtype: tensor.dtype,
                });
            }
        }
        for (prefix, parts) in prefixes.iter().zip(&mut parts) {
            parts.sort_by_key(|part| (part.range.start, part.range.end));
            for parameter in parameters.iter() {
                let whole = parameter.range();
                let mut next = whole.start;
                let first = parts.partition_point(|part| part.range.start < whole.start);
                for part in parts[first..].iter().take_while(|part| part.range.start < whole.end) {
                    if part.range.start != next {
                        break;
                    }
                    next = part.range.end;
                }
                if next != whole.end {
                    let at = files.first().map_or(Path::new(""), PathBuf::as_path);
                    let name = format!("{prefix}{}", parameter.name);
                    let reason = match next == whole.start {
                        true => format!("the tensor {name} is missing"),
                        false => format!("of the tensor {name} the values from {} on are missing", next - whole.start),
                    };
                    return Err(Error::format(at, reason));
                }
            }
            // One part more would lie over another.
            if parts.windows(2).any(|two| two[0].range.end != two[1].range.start) {
                let at = files.first().map_or(Path::new(""), PathBuf::as_path);
                return Err(Error::format(at, format!("values with the prefix {prefix:?} are there twice")));
            }
        }
        Ok(Self { files, parts })
    }

    /// The values in `ranges` of the buffer with prefix number `prefix`, one after the other.
    pub(crate) fn read(&self, prefix: usize, ranges: &[Range<usize>]) -> Result<Vec<f32>, Error> {
        let mut values = vec![0f32; ranges.iter().map(Range::len).sum()];
        let mut bytes = vec![0; 4 * PIECE];
        let mut rest = values.as_mut_slice();
        let mut open: Option<(usize, File)> = None;
        for range in ranges {
            let parts = &self.parts[prefix];
            let first = parts.partition_point(|part| part.range.end <= range.start);
            for part in parts[first..].iter().take_while(|part| part.range.start < range.end) {
                let (begin, end) = (part.range.start.max(range.start), part.range.end.min(range.end));
                let (to, after) = std::mem::take(&mut rest).split_at_mut(end - begin);
                rest = after;
                let path = &self.files[part.file];
                if open.as_ref().is_none_or(|(number, _)| *number != part.file) {
                    open = Some((part.file, File::open(path).map_err(Error::io(path))?));
                }
                let Some((_, file)) = &mut open else { unreachable!("opened above") };
                let width = if part.dtype == Dtype::F32 { 4 } else { 2 };
                let position = part.position + (width * (begin - part.range.start)) as u64;
                file.seek(SeekFrom::Start(position)).map_err(Error::io(path))?;
                for to in to.chunks_mut(PIECE) {
                    let bytes = &mut bytes[..to.len() * width];
                    file.read_exact(bytes).map_err(Error::io(path))?;
                    decode(bytes, part.dtype, to);
                }
            }
        }
        Ok(values)
    }
}

/// The buffer of the first prefix, read piece by piece.
impl Values for Store {
    fn read(&self, range: Range<usize>) -> Result<Cow<'_, [f32]>, Error> {
        Self::read(self, 0, &[range]).map(Cow::Owned)
    }
}

/// Makes float32 of what a file holds.
fn decode(bytes: &[u8], dtype: Dtype, to: &mut [f32]) {
    let to = to.iter_mut();
    match dtype {
        Dtype::F16 => to.zip(bytes.as_chunks::<2>().0).for_each(|(to, x)| *to = f16::from_le_bytes(*x).to_f32()),
        Dtype::BF16 => to.zip(bytes.as_chunks::<2>().0).for_each(|(to, x)| *to = bf16::from_le_bytes(*x).to_f32()),
        _ => to.zip(bytes.as_chunks::<4>().0).for_each(|(to, x)| *to = f32::from_le_bytes(*x)),
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;
    use crate::parallel::Partition;

    fn config() -> ModelConfig {
        ModelConfig {
            vocab_size: 300,
            decoder_embed_dim: 24,
            decoder_layers: 2,
            decoder_attention_heads: 3,
            hidden_dim: 24,
            glu_dim: 40,
            linear_use_lrpe_list: vec![1, 0],
            ..ModelConfig::default()
        }
    }

    fn numbers(count: usize) -> Vec<f32> {
        (0..count).map(|n| n as f32 * 0.25 - 100.0).collect()
    }

    #[test]
    fn one_file_is_that_of_the_formats_library() {
        let directory = tempfile::tempdir().unwrap();
        let (own, theirs) = (directory.path().join("own"), directory.path().join("theirs"));
        let list = ParameterList::of(&config());
        let values = numbers(list.total());
        let ranges = [list.range()];
        write(&own, &list, &ranges, &[("", &Shard { ranges: &ranges, values: &values })]).unwrap();
        let tensors = list.iter().map(|parameter| {
            let bytes = bytes(&values[parameter.range()]).into_owned();
            let bytes: &'static [u8] = bytes.leak();
            let view = safetensors::tensor::TensorView::new(Dtype::F32, parameter.shape.clone(), bytes).unwrap();
            (parameter.name.clone(), view)
        });
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize_to_file(tensors, Some(metadata), &theirs).unwrap();
        assert!(std::fs::read(&own).unwrap() == std::fs::read(&theirs).unwrap());
    }

    #[test]
    fn shards_of_any_world_are_read_back_in_any_other() {
        let directory = tempfile::tempdir().unwrap();
        let list = ParameterList::of(&config());
        let (first, second) = (numbers(list.total()), numbers(2 * list.total()).split_off(list.total()));
        let cut = |all: &[f32], ranges: &[Range<usize>]| -> Vec<f32> {
            ranges.iter().flat_map(|range| all[range.clone()].to_vec()).collect()
        };
        for world in [1, 3, 4] {
            let partition = Partition::new(&config(), world);
            let files: Vec<PathBuf> = (0..world)
                .map(|rank| {
                    let path = directory.path().join(format!("{rank}-of-{world}"));
                    let ranges = partition.shard(rank);
                    let (first, second) = (cut(&first, &ranges), cut(&second, &ranges));
                    let [first, second] = [&first, &second].map(|values| Shard { ranges: &ranges, values });
                    write(&path, &list, &ranges, &[("a.", &first), ("b.", &second)]).unwrap();
                    path
                })
                .collect();
            let store = Store::open(files.clone(), &list, &["a.", "b."]).unwrap();
            for other in [1, 2, 5, 8] {
                let partition = Partition::new(&config(), other);
                for rank in 0..other {
                    let ranges = partition.shard(rank);
                    assert!(store.read(0, &ranges).unwrap() == cut(&first, &ranges), "{world} {other} {rank}");
                    assert!(store.read(1, &ranges).unwrap() == cut(&second, &ranges), "{world} {other} {rank}");
                }
            }
            if world > 1 {
                let error = Store::open(files[1..].to_vec(), &list, &["a.", "b."]).unwrap_err().to_string();
                assert!(error.contains("missing"), "{error}");
                let twice = files.iter().chain(&files[..1]).cloned().collect();
                assert!(Store::open(twice, &list, &["a.", "b."]).is_err());
            }
        }
    }
}
