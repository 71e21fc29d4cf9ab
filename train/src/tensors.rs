//! Named float tensors in safetensors files, and a model's parameters among them.

use std::borrow::Cow;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
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
/// Before how far the rows of a part are apart in the parameter, where it has several.
const APART: char = '/';

/// What values of a parameter are written as.
struct Piece {
    /// What follows the name of the parameter.
    suffix: String,
    shape: Vec<usize>,
    /// Of the flat buffer.
    range: Range<usize>,
}

/// The tensors that hold the values `part` of the flat buffer, all of one parameter: itself; or runs of its values without
/// a gap, of one dimension and named `NAME@FIRST`; and where several whole runs follow each other a matrix of
/// them, `NAME@FIRST/STRIDE`. FIRST and STRIDE count values of the parameter of the whole model.
fn pieces(parameter: &Parameter, part: Range<usize>) -> Vec<Piece> {
    let (place, whole) = (parameter.place, parameter.range());
    if place.is_whole() && part == whole {
        return vec![Piece { suffix: String::new(), shape: parameter.shape.clone(), range: part }];
    }
    let mut pieces = Vec::new();
    let mut next = part.start;
    while next < part.end {
        let (row, column) = ((next - whole.start) / place.run, (next - whole.start) % place.run);
        let first = place.first + row * place.stride + column;
        let rows = (part.end - next) / place.run;
        let (suffix, shape) = match column {
            0 if rows > 1 => (format!("{PART}{first}{APART}{}", place.stride), vec![rows, place.run]),
            _ => (format!("{PART}{first}"), vec![(place.run - column).min(part.end - next)]),
        };
        let end = next + shape.iter().product::<usize>();
        pieces.push(Piece { suffix, shape, range: next..end });
        next = end;
    }
    pieces
}

/// Writes what `buffers` have of the flat buffer, each with a prefix, in float32: what of it is in `ranges`, as tensors that
/// [`pieces`] names.
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
                for Piece { suffix, shape, range } in pieces(parameter, part) {
                    let name = format!("{prefix}{}{suffix}", parameter.name);
                    tensors.push(Tensor { name, shape, range, values: *values });
                }
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
    /// The parameters as ranges of the flat buffer.
    parameters: Vec<Range<usize>>,
    /// By prefix, then by parameter, in the order of their first values. Every value is in one of them.
    parts: Vec<Vec<Vec<Part>>>,
}

/// Values that lie in one place: rows of one length, at equal distances in the flat buffer.
#[derive(Clone, Debug)]
struct Part {
    /// Number of the first value in the flat buffer.
    first: usize,
    rows: usize,
    /// Values of a row, at least one.
    width: usize,
    /// From the beginning of one row to that of the next, at least `width`.
    stride: usize,
    file: usize,
    /// Of the first value, in bytes from the beginning of the file.
    position: u64,
    dtype: Dtype,
}

impl Part {
    /// The number of value `at` of the flat buffer among those of the part, and how many follow without a gap, itself
    /// one of them; nothing where it is not there.
    fn find(&self, at: usize) -> Option<(usize, usize)> {
        let from = at.checked_sub(self.first)?;
        let (row, column) = (from / self.stride, from % self.stride);
        (row < self.rows && column < self.width).then(|| (row * self.width + column, self.width - column))
    }

    fn len(&self) -> usize {
        self.rows * self.width
    }
}

/// The part of `parts` that has value `at`, with what [`Part::find`] says of it. Begins to look at the part `hint`, which
/// becomes the one that was found: what lies beside each other mostly is in the same part or the next.
fn find<'a>(parts: &'a [Part], at: usize, hint: &mut usize) -> Option<(&'a Part, usize, usize)> {
    (0..parts.len()).find_map(|step| {
        let number = (*hint + step) % parts.len();
        let (place, follow) = parts[number].find(at)?;
        *hint = number;
        Some((&parts[number], place, follow))
    })
}

/// What a name says after [`PART`]: the first value, and how far rows are apart.
fn place_of(text: &str) -> Option<(usize, Option<usize>)> {
    match text.split_once(APART) {
        Some((first, stride)) => Some((first.parse().ok()?, Some(stride.parse().ok()?))),
        None => Some((text.parse().ok()?, None)),
    }
}

/// Rows, their length and their distance of a tensor of this shape at this place of a parameter; nothing where it does not fit.
fn rows_of(parameter: &Parameter, place: Option<(usize, Option<usize>)>, shape: &[usize]) -> Option<[usize; 3]> {
    let count = parameter.range().len();
    let (first, [rows, width, stride]) = match (place, shape) {
        (None, shape) => return (shape == parameter.shape).then_some([1, count, count]),
        (Some((first, None)), &[width]) => (first, [1, width, width]),
        (Some((first, Some(stride))), &[rows, width]) => (first, [rows, width, stride]),
        _ => return None,
    };
    let last = rows.checked_sub(1)?.checked_mul(stride)?.checked_add(first)?;
    let fits = width > 0 && stride >= width && last.checked_add(width)? <= count;
    fits.then_some([rows, width, stride])
}

impl Store {
    /// Of files that together hold the tensors of `parameters` with these prefixes and nothing else, in float32, float16 or
    /// bfloat16.
    pub(crate) fn open(files: Vec<PathBuf>, parameters: &ParameterList, prefixes: &[&str]) -> Result<Self, Error> {
        let named: HashMap<&str, (usize, &Parameter)> =
            parameters.iter().enumerate().map(|(number, p)| (p.name.as_str(), (number, p))).collect();
        let mut parts: Vec<Vec<Vec<Part>>> = vec![vec![Vec::new(); named.len()]; prefixes.len()];
        for (of, path) in files.iter().enumerate() {
            let mut file = File::open(path).map_err(Error::io(path))?;
            let (begin, head) = head(&mut file, path)?;
            for name in head.offset_keys() {
                let Some(tensor) = head.info(&name) else { continue };
                let (plain, place) = match name.rsplit_once(PART).map(|(plain, place)| (plain, place_of(place))) {
                    Some((plain, Some(place))) => (plain, Some(place)),
                    _ => (name.as_str(), None),
                };
                let known = prefixes
                    .iter()
                    .enumerate()
                    .find_map(|(index, prefix)| Some((index, *named.get(plain.strip_prefix(prefix)?)?)));
                let Some((prefix, (number, parameter))) = known else {
                    let reason = format!("the model has no place for the tensor {name}");
                    return Err(Error::format(path, reason));
                };
                let Some([rows, width, stride]) = rows_of(parameter, place, &tensor.shape) else {
                    let (has, want) = (&tensor.shape, &parameter.shape);
                    let reason = format!("the tensor {name} is {has:?}, the configuration says {want:?}");
                    return Err(Error::format(path, reason));
                };
                if !matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                    let reason = format!("the tensor {name} has the type {:?}, not a float", tensor.dtype);
                    return Err(Error::format(path, reason));
                }
                parts[prefix][number].push(Part {
                    first: parameter.offset + place.map_or(0, |(first, _)| first),
                    rows,
                    width,
                    stride,
                    file: of,
                    position: begin + tensor.data_offsets.0 as u64,
                    dtype: tensor.dtype,
                });
            }
        }
        let at = files.first().map_or(Path::new(""), PathBuf::as_path);
        for (prefix, parts) in prefixes.iter().zip(&mut parts) {
            for (parameter, parts) in parameters.iter().zip(parts) {
                parts.sort_by_key(|part| part.first);
                let (whole, mut hint) = (parameter.range(), 0);
                let mut next = whole.start;
                while next < whole.end {
                    let Some((_, _, follow)) = find(parts, next, &mut hint) else { break };
                    next += follow;
                }
                if next != whole.end {
                    let name = format!("{prefix}{}", parameter.name);
                    let reason = match next == whole.start {
                        true => format!("the tensor {name} is missing"),
                        false => format!("of the tensor {name} the values from {} on are missing", next - whole.start),
                    };
                    return Err(Error::format(at, reason));
                }
                // All are there: one more lies over another.
                if parts.iter().map(Part::len).sum::<usize>() > whole.len() {
                    let reason = format!("values of the tensor {prefix}{} are there twice", parameter.name);
                    return Err(Error::format(at, reason));
                }
            }
        }
        Ok(Self { files, parameters: parameters.iter().map(Parameter::range).collect(), parts })
    }

    /// The values in `ranges` of the buffer with prefix number `prefix`, one after the other.
    pub(crate) fn read(&self, prefix: usize, ranges: &[Range<usize>]) -> Result<Vec<f32>, Error> {
        /// Files that are open at once.
        const OPEN: usize = 64;
        let mut values = vec![0f32; ranges.iter().map(Range::len).sum()];
        let mut bytes = vec![0; 4 * PIECE];
        let mut rest = values.as_mut_slice();
        let mut open: HashMap<usize, File> = HashMap::new();
        let mut hint = 0;
        for range in ranges {
            let mut next = range.start;
            while next < range.end {
                let number = self.parameters.partition_point(|parameter| parameter.end <= next);
                let Some((part, place, follow)) = find(&self.parts[prefix][number], next, &mut hint) else {
                    unreachable!("every value was found when the files were opened")
                };
                let count = follow.min(range.end - next);
                next += count;
                let (to, after) = std::mem::take(&mut rest).split_at_mut(count);
                rest = after;
                let path = &self.files[part.file];
                if open.len() >= OPEN && !open.contains_key(&part.file) {
                    open.clear();
                }
                let file = match open.entry(part.file) {
                    Entry::Occupied(file) => file.into_mut(),
                    Entry::Vacant(place) => place.insert(File::open(path).map_err(Error::io(path))?),
                };
                let width = if part.dtype == Dtype::F32 { 4 } else { 2 };
                let position = part.position + (width * place) as u64;
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

    #[test]
    fn parts_of_blocks_are_read_back_in_any_other_parts() {
        let directory = tempfile::tempdir().unwrap();
        let config =
            ModelConfig { decoder_attention_heads: 4, glu_dim: 40, linear_use_lrpe_list: vec![1, 1], ..config() };
        let list = ParameterList::of(&config);
        let all = numbers(list.total());
        let cut = |ranges: &[Range<usize>]| -> Vec<f32> {
            ranges.iter().flat_map(|range| all[range.clone()].to_vec()).collect()
        };
        let shards = |parts: usize, world: usize| -> Vec<(Partition, usize, usize)> {
            let of = |part| (0..world).map(move |rank| (part, rank));
            let all = (0..parts).flat_map(of);
            all.map(|(part, rank)| (Partition::of(ParameterList::part(&config, part, parts), world), part, rank))
                .collect()
        };
        for (parts, world) in [(1, 2), (2, 1), (2, 3), (4, 2)] {
            let mut files = Vec::new();
            for (partition, part, rank) in shards(parts, world) {
                let held = partition.shard(rank);
                let ranges: Vec<Range<usize>> = (0..held.len())
                    .filter(|bucket| part == 0 || partition.is_split(*bucket))
                    .map(|bucket| held[bucket].clone())
                    .collect();
                let values = cut(&partition.places(rank));
                let path = directory.path().join(format!("{part}-{rank}-of-{parts}-{world}"));
                let shard = Shard { ranges: &held, values: &values };
                write(&path, partition.parameters(), &ranges, &[("a.", &shard)]).unwrap();
                files.push(path);
            }
            let store = Store::open(files.clone(), &list, &["a."]).unwrap();
            assert!(store.read(0, &[list.range()]).unwrap() == all, "{parts} {world}");
            for (others, other) in [(1, 1), (2, 2), (4, 1)] {
                for (partition, _, rank) in shards(others, other) {
                    let places = partition.places(rank);
                    assert!(store.read(0, &places).unwrap() == cut(&places), "{parts} {world} {others} {other} {rank}");
                }
            }
            let error = Store::open(files[..files.len() - 1].to_vec(), &list, &["a."]).unwrap_err().to_string();
            assert!(error.contains("missing"), "{error}");
            files.push(files[files.len() - 1].clone());
            let error = Store::open(files, &list, &["a."]).unwrap_err().to_string();
            assert!(error.contains("twice"), "{error}");
        }
    }

    #[test]
    fn names_say_what_part_of_a_parameter_a_tensor_is() {
        let config = ModelConfig { decoder_attention_heads: 2, ..config() };
        let list = ParameterList::part(&config, 1, 2);
        let named = |number: usize, part: Range<usize>| -> Vec<(String, Vec<usize>)> {
            let parameter = &list.iter().as_slice()[number];
            let part = parameter.offset + part.start..parameter.offset + part.end;
            pieces(parameter, part).into_iter().map(|piece| (piece.suffix, piece.shape)).collect()
        };
        // The embedding, whole and in part; the second half of the rows of q, k, v and u, 12 of 24 values; that of the columns of
        // the output, from the third value of its first row to the second of its last; the angles.
        assert_eq!(named(0, 0..300 * 24), [(String::new(), vec![300, 24])]);
        assert_eq!(named(0, 5..300 * 24), [("@5".into(), vec![300 * 24 - 5])]);
        assert_eq!(named(1, 0..48 * 24), [("@288/576".into(), vec![4, 288])]);
        let rows = [("@15".into(), vec![9]), ("@36/24".into(), vec![22, 12]), ("@564".into(), vec![2])];
        assert_eq!(named(2, 3..12 + 22 * 12 + 2), rows);
        assert_eq!(named(3, 0..12), [("@12".into(), vec![12])]);
        // What does not fit is refused.
        let whole = ParameterList::of(&config);
        let out = &whole.iter().as_slice()[2];
        assert_eq!(rows_of(out, place_of("12/24"), &[24, 12]), Some([24, 12, 24]));
        for (place, shape) in [
            ("13/24", vec![24, 12]),
            ("0/3", vec![2, 4]),
            ("0/24", vec![0, 4]),
            ("0", vec![0]),
            ("577", vec![1]),
            ("0", vec![2, 2]),
        ] {
            assert_eq!(rows_of(out, place_of(place), &shape), None, "{place} {shape:?}");
        }
        assert_eq!(place_of("1/x"), None);
    }
}
