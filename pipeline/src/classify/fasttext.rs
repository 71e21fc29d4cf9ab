//! fastText models: reads the `.bin` and `.ftz` files of supervised models and predicts as the original does.
//!
//! The format is that of fastText's `FastText::saveModel`, version 12 (and 11): settings, dictionary, input matrix
//! (dense or product-quantised), output matrix. Joulin et al., *Bag of Tricks for Efficient Text Classification*
//! (arXiv:1607.01759) and *FastText.zip* (arXiv:1612.03651).

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use super::ModelError;

/// First number of a model file.
const MAGIC: i32 = 793_712_314;
/// The token that stands for the end of a line.
const END: &[u8] = b"</s>";
/// A model says itself how large it is; what is larger than this is no model (elements of a matrix).
const MAX_ELEMENTS: u64 = 1 << 34;

/// A supervised fastText model.
pub struct FastText {
    dim: usize,
    word_ngrams: usize,
    min_n: usize,
    max_n: usize,
    bucket: u64,
    loss: Loss,
    words: Words,
    labels: Vec<String>,
    /// Where the n-grams of a quantised model are, sorted by number; empty when all are there.
    pruned: Option<Vec<(i32, i32)>>,
    input: Matrix,
    output: Matrix,
    tree: Vec<Node>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    HierarchicalSoftmax,
    /// One sigmoid for each label: negative sampling and one-versus-all.
    Sigmoids,
    Softmax,
}

/// Memory of a prediction, kept from text to text.
#[derive(Default)]
pub struct FastTextScratch {
    rows: Vec<u32>,
    hashes: Vec<i32>,
    hidden: Vec<f32>,
    scores: Vec<f32>,
    word: Vec<u8>,
}

impl FastText {
    /// Whether the file begins as a fastText model does.
    pub fn is_model(path: &Path) -> bool {
        let mut magic = [0; 4];
        File::open(path).and_then(|mut f| f.read_exact(&mut magic)).is_ok() && i32::from_le_bytes(magic) == MAGIC
    }

    /// Reads a model; all of it is held in memory.
    ///
    /// # Errors
    /// [`ModelError`] with the file and what is wrong with it.
    pub fn load(path: &Path) -> Result<Self, ModelError> {
        let fail = |reason: String| ModelError { path: path.into(), reason };
        let file = File::open(path).map_err(|e| fail(e.to_string()))?;
        let mut input = Source(BufReader::with_capacity(1 << 20, file));
        Self::read(&mut input).map_err(|reason| fail(format!("not a readable fastText model: {reason}")))
    }

    fn read(file: &mut Source<impl Read>) -> Result<Self, String> {
        if file.i32()? != MAGIC {
            return Err("it does not begin as one".into());
        }
        let version = file.i32()?;
        if !(11..=12).contains(&version) {
            return Err(format!("format version {version}, versions 11 and 12 are known"));
        }
        let mut settings = [0; 12];
        for setting in &mut settings {
            *setting = file.i32()?;
        }
        let [dim, _window, _epochs, _min_count, _negatives, word_ngrams, loss, model, bucket, min_n, max_n, _rate] =
            settings;
        file.take::<8>()?;
        if model != 3 {
            return Err("a model of word vectors; only supervised models classify".into());
        }
        let loss = match loss {
            1 => Loss::HierarchicalSoftmax,
            2 | 4 => Loss::Sigmoids,
            3 => Loss::Softmax,
            other => return Err(format!("unknown loss {other}")),
        };
        let positive = |name: &str, value: i32| usize::try_from(value).map_err(|_| format!("{name} is {value}"));
        let dim = positive("dim", dim)?;
        // Version 11 wrote no n-grams of characters into supervised models, whatever its settings say.
        let max_n = if version == 11 { 0 } else { positive("maxn", max_n)? };

        let _size = file.i32()?;
        let word_count = positive("the number of words", file.i32()?)?;
        let label_count = positive("the number of labels", file.i32()?)?;
        let _tokens = file.i64()?;
        let pruned_count = file.i64()?;
        let mut words = Words::with_room(word_count)?;
        let mut labels = Vec::new();
        let mut label_counts = Vec::new();
        for _ in 0..word_count + label_count {
            let entry = file.until_zero()?;
            let count = file.i64()?;
            match file.take::<1>()?[0] {
                0 => words.add(&entry),
                1 => {
                    labels.push(String::from_utf8_lossy(&entry).into_owned());
                    label_counts.push(count);
                }
                other => return Err(format!("entry of kind {other} in the dictionary")),
            }
        }
        if labels.len() != label_count || labels.is_empty() {
            return Err(format!("{} labels where {label_count} were announced", labels.len()));
        }
        let pruned = match pruned_count {
            ..0 => None,
            count => {
                let mut pairs = Vec::new();
                for _ in 0..count {
                    pairs.push((file.i32()?, file.i32()?));
                }
                pairs.sort_unstable();
                Some(pairs)
            }
        };
        let quantised = file.take::<1>()?[0] != 0;
        let input = if quantised { Matrix::read_quantised(file)? } else { Matrix::read_dense(file)? };
        let quantised_output = file.take::<1>()?[0] != 0 && quantised;
        let output = if quantised_output { Matrix::read_quantised(file)? } else { Matrix::read_dense(file)? };
        if input.columns != dim || output.columns != dim {
            return Err(format!("matrices of {} and {} columns for dim = {dim}", input.columns, output.columns));
        }
        if output.rows < labels.len() {
            return Err(format!("{} rows for {} labels", output.rows, labels.len()));
        }
        let tree = match loss {
            Loss::HierarchicalSoftmax => huffman(&label_counts),
            _ => Vec::new(),
        };
        Ok(Self {
            dim,
            word_ngrams: positive("wordNgrams", word_ngrams)?,
            min_n: positive("minn", min_n)?,
            max_n,
            bucket: positive("bucket", bucket)? as u64,
            loss,
            words,
            labels,
            pruned,
            input,
            output,
            tree,
        })
    }

    /// The labels in the order of [`Self::probabilities`], with their prefix.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// Probability of each label for `text`, taken as one line (newlines count as spaces, as fastText's users have to
    /// make them); none when the model knows nothing of the text.
    pub fn probabilities<'s>(&self, text: &str, scratch: &'s mut FastTextScratch) -> Option<&'s [f32]> {
        self.hide(text, scratch)?;
        let FastTextScratch { hidden, scores, .. } = scratch;
        scores.clear();
        match self.loss {
            Loss::Softmax => {
                scores.extend((0..self.labels.len()).map(|row| self.output.dot(row, hidden)));
                let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                scores.iter_mut().for_each(|score| *score = (*score - max).exp());
                let sum: f32 = scores.iter().sum();
                scores.iter_mut().for_each(|score| *score /= sum);
            }
            Loss::Sigmoids => {
                scores.extend((0..self.labels.len()).map(|row| tabulated_sigmoid(self.output.dot(row, hidden))));
            }
            Loss::HierarchicalSoftmax => {
                scores.resize(self.labels.len(), 0.0);
                let leaves = self.labels.len();
                let mut open = vec![(self.tree.len() - 1, 0f32)];
                while let Some((node, score)) = open.pop() {
                    if node < leaves {
                        scores[node] = score.exp();
                        continue;
                    }
                    let right = sigmoid(self.output.dot(node - leaves, hidden));
                    open.push((self.tree[node].left, score + (1.0 - right + 1e-5).ln()));
                    open.push((self.tree[node].right, score + (right + 1e-5).ln()));
                }
            }
        }
        Some(scores.as_slice())
    }

    /// Number and probability of the likeliest label.
    pub fn best(&self, text: &str, scratch: &mut FastTextScratch) -> Option<(usize, f32)> {
        let probabilities = self.probabilities(text, scratch)?;
        // Of equals the first.
        (0..probabilities.len())
            .rev()
            .max_by(|a, b| probabilities[*a].total_cmp(&probabilities[*b]))
            .map(|best| (best, probabilities[best].min(1.0)))
    }

    /// The mean of the rows of all words and n-grams.
    fn hide(&self, text: &str, scratch: &mut FastTextScratch) -> Option<()> {
        let FastTextScratch { rows, hashes, hidden, word, .. } = scratch;
        rows.clear();
        hashes.clear();
        let is_space = |b: &u8| matches!(b, b' ' | b'\n' | b'\r' | b'\t' | 0x0b | 0x0c | 0);
        // The end of a line, which fastText adds, ends the text also where it stands in it.
        let words = text.as_bytes().split(is_space).take_while(|t| *t != END);
        let tokens = words.filter(|t| !t.is_empty()).chain([END]);
        for token in tokens {
            let hash = fnv(token);
            match self.words.get(token, hash) {
                Some(row) => {
                    rows.push(row);
                    if self.max_n > 0 && token != END {
                        self.subwords(token, word, rows);
                    }
                }
                // A label in the text is no word of it.
                None if token.starts_with(b"__label__") => continue,
                None if token != END => self.subwords(token, word, rows),
                None => {}
            }
            hashes.push(hash as i32);
        }
        if self.word_ngrams > 1 && self.bucket > 0 {
            for first in 0..hashes.len() {
                let mut hash = hashes[first] as u64;
                for next in &hashes[first + 1..hashes.len().min(first + self.word_ngrams)] {
                    hash = hash.wrapping_mul(116_049_371).wrapping_add(*next as u64);
                    self.push(rows, hash % self.bucket);
                }
            }
        }
        hidden.clear();
        hidden.resize(self.dim, 0.0);
        let known = rows.iter().filter(|row| (**row as usize) < self.input.rows);
        let mut count = 0;
        for row in known {
            self.input.add(*row as usize, hidden);
            count += 1;
        }
        if count == 0 {
            return None;
        }
        let scale = 1.0 / count as f32;
        hidden.iter_mut().for_each(|value| *value *= scale);
        Some(())
    }

    /// Rows of the n-grams of characters of a word between `<` and `>`.
    fn subwords(&self, token: &[u8], word: &mut Vec<u8>, rows: &mut Vec<u32>) {
        if self.max_n == 0 || self.bucket == 0 {
            return;
        }
        word.clear();
        word.push(b'<');
        word.extend_from_slice(token);
        word.push(b'>');
        let continues = |at: usize| word.get(at).is_some_and(|b| b & 0xc0 == 0x80);
        for start in 0..word.len() {
            if continues(start) {
                continue;
            }
            let mut hash = FNV_START;
            let mut end = start;
            for n in 1..=self.max_n {
                if end >= word.len() {
                    break;
                }
                loop {
                    hash = fnv_step(hash, word[end]);
                    end += 1;
                    if !continues(end) {
                        break;
                    }
                }
                if n >= self.min_n && !(n == 1 && (start == 0 || end == word.len())) {
                    self.push(rows, u64::from(hash) % self.bucket);
                }
            }
        }
    }

    /// The row of the n-gram of number `id`, where the model has kept it.
    fn push(&self, rows: &mut Vec<u32>, id: u64) {
        let id = match &self.pruned {
            None => id,
            Some(kept) => match kept.binary_search_by_key(&(id as i32), |(id, _)| *id) {
                Ok(at) => kept[at].1 as u64,
                Err(_) => return,
            },
        };
        rows.push((self.words.len() as u64 + id) as u32);
    }
}

/// As fastText takes it from a table of 512 steps from -8 to 8: a model's probabilities have its steps.
fn tabulated_sigmoid(x: f32) -> f32 {
    const STEPS: f32 = 512.0;
    const REACH: f32 = 8.0;
    match x {
        x if x < -REACH => 0.0,
        x if x > REACH => 1.0,
        x => sigmoid(((x + REACH) * STEPS / REACH / 2.0).trunc() * 2.0 * REACH / STEPS - REACH),
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

const FNV_START: u32 = 2_166_136_261;

fn fnv_step(hash: u32, byte: u8) -> u32 {
    // The original hashes signed characters.
    (hash ^ (byte as i8 as u32)).wrapping_mul(16_777_619)
}

fn fnv(bytes: &[u8]) -> u32 {
    bytes.iter().fold(FNV_START, |hash, byte| fnv_step(hash, *byte))
}

/// The words of the dictionary: their numbers by open addressing.
struct Words {
    text: Vec<u8>,
    ends: Vec<u32>,
    slots: Vec<u32>,
}

impl Words {
    fn with_room(words: usize) -> Result<Self, String> {
        if words > 1 << 30 {
            return Err(format!("{words} words"));
        }
        Ok(Self { text: Vec::new(), ends: Vec::new(), slots: vec![0; (words * 2).next_power_of_two().max(16)] })
    }

    fn len(&self) -> usize {
        self.ends.len()
    }

    fn word(&self, number: usize) -> &[u8] {
        let start = if number == 0 { 0 } else { self.ends[number - 1] as usize };
        &self.text[start..self.ends[number] as usize]
    }

    fn add(&mut self, word: &[u8]) {
        self.text.extend_from_slice(word);
        self.ends.push(self.text.len() as u32);
        let mut at = fnv(word) as usize & (self.slots.len() - 1);
        // A damaged file may hold more words than it said.
        if self.ends.len() * 2 > self.slots.len() {
            return;
        }
        while self.slots[at] != 0 {
            at = (at + 1) & (self.slots.len() - 1);
        }
        self.slots[at] = self.ends.len() as u32;
    }

    fn get(&self, word: &[u8], hash: u32) -> Option<u32> {
        let mut at = hash as usize & (self.slots.len() - 1);
        loop {
            match self.slots[at] {
                0 => return None,
                slot if self.word(slot as usize - 1) == word => return Some(slot - 1),
                _ => at = (at + 1) & (self.slots.len() - 1),
            }
        }
    }
}

/// A matrix, dense or product-quantised.
struct Matrix {
    rows: usize,
    columns: usize,
    values: Values,
}

enum Values {
    Dense(Vec<f32>),
    Quantised { codes: Vec<u8>, quantiser: Quantiser, norms: Option<(Vec<u8>, Quantiser)> },
}

/// Centroids for parts of a vector.
struct Quantiser {
    parts: usize,
    width: usize,
    last_width: usize,
    centroids: Vec<f32>,
}

impl Matrix {
    fn read_dense(file: &mut Source<impl Read>) -> Result<Self, String> {
        let (rows, columns) = file.shape()?;
        let values = file.floats(rows * columns)?;
        Ok(Self { rows, columns, values: Values::Dense(values) })
    }

    fn read_quantised(file: &mut Source<impl Read>) -> Result<Self, String> {
        let with_norms = file.take::<1>()?[0] != 0;
        let (rows, columns) = file.shape()?;
        let size = usize::try_from(file.i32()?).map_err(|_| "a negative number of codes")?;
        let codes = file.bytes(size)?;
        let quantiser = Quantiser::read(file)?;
        if quantiser.parts * rows != size || (quantiser.parts - 1) * quantiser.width + quantiser.last_width != columns {
            return Err("a quantised matrix whose sizes do not fit each other".into());
        }
        let norms = if with_norms {
            let codes = file.bytes(rows)?;
            Some((codes, Quantiser::read(file)?))
        } else {
            None
        };
        Ok(Self { rows, columns, values: Values::Quantised { codes, quantiser, norms } })
    }

    fn add(&self, row: usize, sum: &mut [f32]) {
        match &self.values {
            Values::Dense(values) => {
                let row = &values[row * self.columns..(row + 1) * self.columns];
                sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
            }
            Values::Quantised { .. } => self.each_part(row, |at, part, norm| {
                sum[at..at + part.len()].iter_mut().zip(part).for_each(|(sum, value)| *sum += value * norm);
            }),
        }
    }

    fn dot(&self, row: usize, with: &[f32]) -> f32 {
        match &self.values {
            Values::Dense(values) => {
                let row = &values[row * self.columns..(row + 1) * self.columns];
                row.iter().zip(with).map(|(a, b)| a * b).sum()
            }
            Values::Quantised { .. } => {
                let (mut sum, mut scale) = (0.0, 1.0);
                self.each_part(row, |at, part, norm| {
                    sum += with[at..at + part.len()].iter().zip(part).map(|(a, b)| a * b).sum::<f32>();
                    scale = norm;
                });
                sum * scale
            }
        }
    }

    /// The parts of a quantised row: where each begins, its centroid and the row's norm.
    fn each_part(&self, row: usize, mut visit: impl FnMut(usize, &[f32], f32)) {
        let Values::Quantised { codes, quantiser, norms } = &self.values else { return };
        let norm = norms.as_ref().map_or(1.0, |(codes, quantiser)| quantiser.centroid(0, codes[row])[0]);
        for part in 0..quantiser.parts {
            let code = codes[row * quantiser.parts + part];
            visit(part * quantiser.width, quantiser.centroid(part, code), norm);
        }
    }
}

impl Quantiser {
    fn read(file: &mut Source<impl Read>) -> Result<Self, String> {
        let mut sizes = [0usize; 4];
        for size in &mut sizes {
            *size = usize::try_from(file.i32()?).map_err(|_| "a negative size of a quantiser")?;
        }
        let [dim, parts, width, last_width] = sizes;
        if parts == 0 || width == 0 || last_width == 0 || last_width > width || (parts - 1) * width + last_width != dim
        {
            return Err("a quantiser whose sizes do not fit each other".into());
        }
        Ok(Self { parts, width, last_width, centroids: file.floats(dim * 256)? })
    }

    fn centroid(&self, part: usize, code: u8) -> &[f32] {
        let width = if part + 1 == self.parts { self.last_width } else { self.width };
        let start = part * 256 * self.width + usize::from(code) * width;
        &self.centroids[start..start + width]
    }
}

/// A node of the tree of hierarchical softmax; the first ones are the labels.
struct Node {
    left: usize,
    right: usize,
    count: i64,
}

/// The tree as the original builds it from the counts of the labels, which are in descending order.
fn huffman(counts: &[i64]) -> Vec<Node> {
    let leaves = counts.len();
    let mut tree: Vec<Node> = counts.iter().map(|count| Node { left: 0, right: 0, count: *count }).collect();
    tree.extend((leaves..2 * leaves - 1).map(|_| Node { left: 0, right: 0, count: 1_000_000_000_000_000 }));
    let mut leaf = leaves;
    let mut node = leaves;
    for at in leaves..2 * leaves - 1 {
        let mut next = || {
            if leaf > 0 && tree[leaf - 1].count < tree[node].count {
                leaf -= 1;
                leaf
            } else {
                node += 1;
                node - 1
            }
        };
        let (left, right) = (next(), next());
        tree[at] = Node { left, right, count: tree[left].count + tree[right].count };
    }
    tree
}

/// Little-endian numbers of a file.
struct Source<R>(R);

impl<R: Read> Source<R> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes).map_err(|e| e.to_string())?;
        Ok(bytes)
    }

    fn i32(&mut self) -> Result<i32, String> {
        self.take().map(i32::from_le_bytes)
    }

    fn i64(&mut self) -> Result<i64, String> {
        self.take().map(i64::from_le_bytes)
    }

    fn until_zero(&mut self) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        loop {
            match self.take::<1>()?[0] {
                0 => return Ok(bytes),
                byte if bytes.len() < 1 << 16 => bytes.push(byte),
                _ => return Err("a word of more than 65536 bytes".into()),
            }
        }
    }

    fn shape(&mut self) -> Result<(usize, usize), String> {
        let (rows, columns) = (self.i64()?, self.i64()?);
        let sizes = u64::try_from(rows).ok().zip(u64::try_from(columns).ok());
        match sizes.filter(|(r, c)| r.checked_mul(*c).is_some_and(|n| n <= MAX_ELEMENTS)) {
            Some((rows, columns)) => Ok((rows as usize, columns as usize)),
            None => Err(format!("a matrix of {rows} rows and {columns} columns")),
        }
    }

    /// Memory is asked for as bytes arrive, so that a damaged size costs none.
    fn bytes(&mut self, count: usize) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        let read = self.0.by_ref().take(count as u64).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
        if read == count { Ok(bytes) } else { Err("the file ends too early".into()) }
    }

    fn floats(&mut self, count: usize) -> Result<Vec<f32>, String> {
        let mut floats = Vec::new();
        let mut left = count;
        while left > 0 {
            let piece = self.bytes(4 * left.min(1 << 20))?;
            floats.extend(piece.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
            left -= left.min(1 << 20);
        }
        Ok(floats)
    }
}
