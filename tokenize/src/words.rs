//! From the parts of a `tokenizer.json` to ids, without the bookkeeping of offsets.
//!
//! `tokenizers` keeps, for every character, where it came from, at some fifty bytes for a byte of text.
//! Nobody here asks for that. For the two kinds of BPE tokenizers in wide use, byte-level ones (as they are
//! or after NFC) and those with a mark for the space and byte fallback, text is cut into pieces and each piece
//! merged; whatever a file asks for beyond that is left to `tokenizers` itself.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use serde::Deserialize;
use tokenizers::normalizers::{NormalizerWrapper, Prepend, replace::ReplacePattern};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{ModelWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

use unicode_normalization::{IsNormalized, is_nfc_quick};
use unicode_normalization_alignments::UnicodeNormalization;

use crate::added::{Added, Part};
use crate::cache::{Key, PieceCache};
use crate::config::Pattern;
use crate::merges::{Buffers, Merges};
use crate::split::Splitter;
use crate::train::byte_characters;

/// The mark that stands for a space where spaces are no bytes of their own.
const MARK: char = '\u{2581}';

/// A BPE tokenizer that is done here.
pub struct Words {
    added: Option<Added>,
    /// Whether text is brought to NFC first.
    nfc: bool,
    cut: Cut,
    symbols: Symbols,
    merges: Merges,
    /// Tokens by piece, where a piece that is a token is never cut further (`ignore_merges`).
    whole: HashMap<Box<[u8]>, u32>,
    scratches: Mutex<Vec<Scratch>>,
}

/// How text becomes pieces.
enum Cut {
    /// By a pattern.
    Pattern(Splitter),
    /// Spaces become marks, and a mark is put in front.
    Marks { front: Front, before: Before },
}

/// When a mark is put in front of the text.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Front {
    Never,
    /// Unless there is one.
    UnlessThere,
    Always,
}

/// Where text with marks is cut.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Before {
    /// Before every mark.
    Mark,
    /// Before every mark but one that follows another: no merge reaches across.
    FirstMark,
    /// Not at all.
    Nothing,
}

/// What a piece is before merging.
enum Symbols {
    /// An id for every byte.
    Bytes(Box<[u32; 256]>),
    /// An id for some characters, those of its bytes for the others.
    Characters { ids: HashMap<char, u32>, bytes: Box<[u32; 256]> },
}

/// What encoding needs for itself, on one thread; kept, so that the next text finds the cache warm.
#[derive(Default)]
pub struct Scratch {
    cache: PieceCache,
    buffers: Buffers,
    marked: String,
}

/// The model in a `tokenizer.json`, as far as it matters here.
#[derive(Deserialize)]
struct Model {
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

/// Older files write `"a b"`, newer ones `["a", "b"]`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Joined(String),
    Pair(String, String),
}

impl Merge {
    fn pair(&self) -> Option<(&str, &str)> {
        match self {
            Self::Joined(text) => text.split_once(' '),
            Self::Pair(left, right) => Some((left, right)),
        }
    }
}

impl Words {
    /// Of a tokenizer and the text it was read from.
    ///
    /// # Errors
    /// What it asks for that would be left out here.
    pub fn of(tokenizer: &Tokenizer, json: &[u8]) -> Result<Self, &'static str> {
        let ModelWrapper::BPE(bpe) = tokenizer.get_model() else { return Err("its model is not BPE") };
        let absent = |affix: &Option<String>| affix.as_ref().is_none_or(String::is_empty);
        if !absent(&bpe.continuing_subword_prefix) || !absent(&bpe.end_of_word_suffix) {
            return Err("its tokens have a prefix or a suffix for their place in a word");
        }
        // Special tokens in the text are text to us; other added tokens are not.
        let added = Added::of(tokenizer).map_err(|()| {
            "an added token that is not special asks for more than its text (single_word, lstrip, rstrip, or a \
             normalization that changes it)"
        })?;
        #[derive(Deserialize)]
        struct File {
            model: Model,
        }
        let File { model } = serde_json::from_slice(json).map_err(|_| "its model is not written as usual")?;
        let id = |text: &str| model.vocab.get(text).copied();
        let triple = |merge: &Merge| {
            let (left, right) = merge.pair()?;
            Some((id(left)?, id(right)?, id(&format!("{left}{right}"))?))
        };
        let merges: Option<Vec<(u32, u32, u32)>> = model.merges.iter().map(triple).collect();
        let merges = merges.ok_or("a merge makes no token of its vocabulary")?;
        let by_marks =
            || marks(tokenizer, &model).filter(|_| added.is_none()).map(|(cut, symbols)| (cut, symbols, false));
        let (cut, symbols, nfc) = pattern(tokenizer, &model).or_else(by_marks).ok_or(
            "its normalizer, pre-tokenizer and alphabet are together no kind that is known here (byte-level, as it is \
             or after NFC; marks for spaces with byte fallback)",
        )?;
        let whole = match model.ignore_merges {
            true => model.vocab.iter().filter_map(|(text, &id)| Some((symbols.bytes_of(text)?, id))).collect(),
            false => HashMap::new(),
        };
        Ok(Self {
            added,
            nfc,
            cut,
            symbols,
            merges: Merges::new(merges.into_iter()),
            whole,
            scratches: Mutex::default(),
        })
    }

    /// The bytes of text that a token of the vocabulary stands for.
    pub fn bytes_of(&self, token: &str) -> Vec<u8> {
        match &self.symbols {
            Symbols::Bytes(_) => self.symbols.bytes_of(token).map_or_else(|| token.into(), Vec::from),
            Symbols::Characters { .. } => {
                let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                match byte.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
                    Some(byte) => vec![byte],
                    None => token.replace(MARK, " ").into_bytes(),
                }
            }
        }
    }

    /// A scratch that nobody uses.
    pub fn take_scratch(&self) -> Scratch {
        self.scratches.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    /// Keep a scratch for who asks next.
    pub fn keep_scratch(&self, scratch: Scratch) {
        self.scratches.lock().unwrap_or_else(PoisonError::into_inner).push(scratch);
    }

    /// Append the ids of `text` to `ids`.
    pub fn encode(&self, text: &str, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        match &self.added {
            None => self.encode_text(&self.normalized(text), scratch, ids),
            Some(added) => added.cut(text, |part| match part {
                Part::Token(id) => ids.push(id),
                Part::Text(text) => added.cut_normalized(&self.normalized(text), |part| match part {
                    Part::Token(id) => ids.push(id),
                    Part::Text(text) => self.encode_text(text, scratch, ids),
                }),
            }),
        }
    }

    /// The text in the normal form of the file.
    fn normalized<'t>(&self, text: &'t str) -> Cow<'t, str> {
        // The quick check and the normalizer of `tokenizers` know different versions of Unicode. A text that passes
        // the check has no character that either would change: what one of them does not know yet, it leaves alone.
        if !self.nfc || text.is_ascii() || is_nfc_quick(text.chars()) == IsNormalized::Yes {
            return Cow::Borrowed(text);
        }
        Cow::Owned(text.nfc().map(|(c, _)| c).collect())
    }

    /// Append the ids of a text without added tokens.
    fn encode_text(&self, text: &str, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        let Scratch { cache, buffers, marked } = scratch;
        match &self.cut {
            Cut::Pattern(splitter) => splitter
                .for_each_end(text, |from, to| self.encode_piece(text.as_bytes(), from, to, cache, buffers, ids)),
            Cut::Marks { front, before } => {
                mark_spaces(text, *front, marked);
                let marked = marked.as_str();
                cut_at_marks(marked, *before, |from, to| {
                    self.encode_piece(marked.as_bytes(), from, to, cache, buffers, ids);
                });
            }
        }
    }

    #[inline(always)]
    fn encode_piece(
        &self,
        text: &[u8],
        from: usize,
        to: usize,
        cache: &mut PieceCache,
        buffers: &mut Buffers,
        ids: &mut Vec<u32>,
    ) {
        let key = Key::of(text, from, to);
        if key.is_none_or(|key| !cache.get(key, ids)) {
            let start = ids.len();
            self.merge_piece(&text[from..to], buffers, ids);
            if let Some(key) = key {
                cache.put(key, &ids[start..]);
            }
        }
    }

    /// The ids of a piece, by merging.
    #[inline(never)]
    fn merge_piece(&self, piece: &[u8], buffers: &mut Buffers, ids: &mut Vec<u32>) {
        if !self.whole.is_empty()
            && let Some(&id) = self.whole.get(piece)
        {
            return ids.push(id);
        }
        let start = ids.len();
        match &self.symbols {
            Symbols::Bytes(bytes) => ids.extend(piece.iter().map(|&byte| bytes[usize::from(byte)])),
            Symbols::Characters { ids: characters, bytes } => {
                // Pieces are cut between characters.
                for c in std::str::from_utf8(piece).unwrap_or_default().chars() {
                    match characters.get(&c) {
                        Some(&id) => ids.push(id),
                        None => {
                            let mut buffer = [0; 4];
                            ids.extend(c.encode_utf8(&mut buffer).bytes().map(|byte| bytes[usize::from(byte)]));
                        }
                    }
                }
            }
        }
        self.merges.merge(ids, start, buffers);
    }
}

impl Symbols {
    /// The bytes of a piece that a token of the vocabulary stands for.
    fn bytes_of(&self, token: &str) -> Option<Box<[u8]>> {
        match self {
            Self::Bytes(_) => {
                let characters = byte_characters();
                let byte = |c| characters.iter().position(|&known| known == c).map(|byte| byte as u8);
                token.chars().map(byte).collect()
            }
            Self::Characters { .. } => Some(token.as_bytes().into()),
        }
    }
}

/// A byte-level tokenizer, and whether it normalizes; another form than NFC is not known here.
fn pattern(tokenizer: &Tokenizer, model: &Model) -> Option<(Cut, Symbols, bool)> {
    let nfc = match normalizers(tokenizer) {
        [] => false,
        [NormalizerWrapper::NFC(_)] => true,
        _ => return None,
    };
    let steps = match tokenizer.get_pre_tokenizer()? {
        PreTokenizerWrapper::Sequence(sequence) => sequence.as_ref(),
        single => std::slice::from_ref(single),
    };
    let (individual_digits, steps) = match steps {
        [PreTokenizerWrapper::Digits(Digits { individual_digits: true, .. }), rest @ ..] => (true, rest),
        all => (false, all),
    };
    let regex = match steps {
        [PreTokenizerWrapper::ByteLevel(ByteLevel { add_prefix_space: false, use_regex: true, .. })] => {
            Pattern::Gpt2.regex()
        }
        [
            PreTokenizerWrapper::Split(Split {
                pattern: SplitPattern::Regex(regex),
                behavior: SplitDelimiterBehavior::Isolated,
                invert: false,
                ..
            }),
            PreTokenizerWrapper::ByteLevel(ByteLevel { add_prefix_space: false, use_regex: false, .. }),
        ] => regex,
        _ => return None,
    };
    let ids = byte_characters().map(|c| model.vocab.get(c.encode_utf8(&mut [0; 4]) as &str).copied());
    let bytes: Vec<u32> = ids.into_iter().collect::<Option<_>>()?;
    let splitter = Splitter::from_regex(regex, individual_digits).ok()?;
    Some((Cut::Pattern(splitter), Symbols::Bytes(bytes.try_into().ok()?), nfc))
}

/// The normalizers of a file, one after the other.
fn normalizers(tokenizer: &Tokenizer) -> &[NormalizerWrapper] {
    match tokenizer.get_normalizer() {
        None => &[],
        Some(NormalizerWrapper::Sequence(sequence)) => sequence.as_ref(),
        Some(single) => std::slice::from_ref(single),
    }
}

/// A tokenizer with a mark for the space and with byte fallback, as SentencePiece makes them.
fn marks(tokenizer: &Tokenizer, model: &Model) -> Option<(Cut, Symbols)> {
    let steps = normalizers(tokenizer);
    let mark = MARK.to_string();
    let is_replace = |step: &NormalizerWrapper| match step {
        NormalizerWrapper::Replace(replace) => {
            let pattern = serde_json::to_value(replace).ok().and_then(|r| Some(r.get("pattern")?.clone()));
            let space = serde_json::to_value(ReplacePattern::String(" ".into())).ok();
            pattern == space && replace.content == mark
        }
        _ => false,
    };
    let (mut front, marked) = match steps {
        [] => (Front::Never, false),
        [replace] if is_replace(replace) => (Front::Never, true),
        [NormalizerWrapper::Prepend(Prepend { prepend }), replace] if *prepend == mark && is_replace(replace) => {
            (Front::Always, true)
        }
        _ => return None,
    };
    let split = match tokenizer.get_pre_tokenizer() {
        None => false,
        Some(PreTokenizerWrapper::Metaspace(metaspace)) if metaspace.get_replacement() == MARK => {
            let scheme: PrependScheme = Metaspace::get_prepend_scheme(metaspace);
            if front == Front::Never && scheme != PrependScheme::Never {
                front = Front::UnlessThere;
            }
            metaspace.get_split()
        }
        Some(_) => return None,
    };
    if !marked && tokenizer.get_pre_tokenizer().is_none() {
        // Spaces stay spaces: some other way of cutting, which is not known here.
        return None;
    }
    if !model.byte_fallback {
        return None;
    }
    let fallback = (0..=255u8).map(|byte| model.vocab.get(&format!("<{byte:#04X}>")).copied());
    let bytes: Vec<u32> = fallback.collect::<Option<_>>()?;
    let mut ids = HashMap::new();
    for (token, &id) in &model.vocab {
        let mut characters = token.chars();
        if let (Some(c), None) = (characters.next(), characters.next()) {
            ids.insert(c, id);
        }
    }
    // A merge that reaches across makes a token in which a mark follows something else. Bytes that stand
    // for an unknown character are such tokens too, but spell no mark.
    let reaches = |token: &str| {
        let mut before = MARK;
        token.chars().any(|c| {
            let across = c == MARK && before != MARK;
            before = c;
            across
        })
    };
    let crossing = !ids.contains_key(&MARK)
        || model.merges.iter().filter_map(Merge::pair).any(|(left, right)| reaches(&format!("{left}{right}")));
    let before = match (split, crossing) {
        (true, _) => Before::Mark,
        (false, false) => Before::FirstMark,
        (false, true) => Before::Nothing,
    };
    Some((Cut::Marks { front, before }, Symbols::Characters { ids, bytes: bytes.try_into().ok()? }))
}

/// `text` with marks for spaces, and one in front.
fn mark_spaces(text: &str, front: Front, marked: &mut String) {
    marked.clear();
    if text.is_empty() {
        return;
    }
    if front == Front::Always || front == Front::UnlessThere && !text.starts_with([' ', MARK]) {
        marked.push(MARK);
    }
    let mut parts = text.split(' ');
    marked.extend(parts.next());
    for part in parts {
        marked.push(MARK);
        marked.push_str(part);
    }
}

/// Call `piece` with the bounds of the pieces of a marked text.
fn cut_at_marks(marked: &str, before: Before, mut piece: impl FnMut(usize, usize)) {
    let mut from = 0;
    if before != Before::Nothing {
        let mut after_mark = 0;
        for (at, mark) in marked.match_indices(MARK) {
            if at > from && (before == Before::Mark || at != after_mark) {
                piece(from, at);
                from = at;
            }
            after_mark = at + mark.len();
        }
    }
    if from < marked.len() {
        piece(from, marked.len());
    }
}
