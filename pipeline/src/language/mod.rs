//! Which language a text is in.
//!
//! The embedded identifier is `whatlang` (trigrams and scripts, 70 languages), chosen by comparison on text with gold
//! labels (docs/BENCHMARKS.md). A recipe may name a fastText model instead: lid.176 (`.bin`, `.ftz`), GlotLID, or one of
//! its own.

mod codes;
mod scripts;

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::classify::{FastText, FastTextScratch, ModelError};

pub use codes::code_of;
pub use scripts::is_unspaced;

/// A longer text is judged by two pieces of this many bytes, from its start and its middle: more tells no more, and the
/// work for a document stays bounded.
const PIECE_BYTES: usize = 4 << 10;
/// A shorter paragraph is not judged by itself (characters).
const MIN_PARAGRAPH_CHARS: usize = 40;
/// Paragraphs of a document that are judged.
const MAX_PARAGRAPHS: usize = 100;

/// How languages are identified.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LanguageConfig {
    /// A fastText model, relative to the recipe's directory; the embedded identifier without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<PathBuf>,
    /// Also judge every paragraph of at least 40 characters: column `language_paragraph_fraction`.
    pub paragraphs: bool,
}

/// Identifies languages.
pub enum Identifier {
    /// `whatlang`.
    Embedded,
    /// A fastText model, and the code of each of its labels.
    Model(Box<FastText>, Vec<String>),
}

/// What language a document is in.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DocumentLanguage {
    /// ISO 639-1 code, or 639-3 where there is none; none for a text without letters.
    pub language: Option<String>,
    /// How sure the identifier is, in [0, 1].
    pub score: f64,
    /// Fraction of the characters of the judged paragraphs that are in paragraphs of this language; none when no
    /// paragraph was judged.
    pub paragraph_fraction: Option<f64>,
}

impl Identifier {
    /// The identifier of a recipe.
    pub fn load(config: &LanguageConfig, base_dir: &Path) -> Result<Self, ModelError> {
        let Some(path) = &config.model else { return Ok(Self::Embedded) };
        let model = FastText::load(&base_dir.join(path))?;
        let codes = model.labels().iter().map(|label| code_of(label).to_owned()).collect();
        Ok(Self::Model(Box::new(model), codes))
    }

    /// Code and certainty of the language of `text`, all of it.
    pub fn identify(&self, text: &str, scratch: &mut FastTextScratch) -> Option<(&str, f64)> {
        match self {
            Self::Embedded => {
                let found = whatlang::detect(text)?;
                Some((code_of(found.lang().code()), found.confidence().clamp(0.0, 1.0)))
            }
            Self::Model(model, codes) => {
                if !text.chars().any(char::is_alphabetic) {
                    return None;
                }
                let (label, probability) = model.best(text, scratch)?;
                Some((codes[label].as_str(), f64::from(probability)))
            }
        }
    }

    /// The language of a document, and of its paragraphs if `paragraphs`.
    pub fn document(&self, text: &str, paragraphs: bool, scratch: &mut FastTextScratch) -> DocumentLanguage {
        let Some((language, score)) = self.identify(&excerpt(text), scratch) else {
            return DocumentLanguage::default();
        };
        let mut found = DocumentLanguage { language: Some(language.to_owned()), score, paragraph_fraction: None };
        if paragraphs {
            let (mut same, mut all) = (0usize, 0usize);
            let judged = text.split('\n').map(str::trim).filter(|p| p.chars().nth(MIN_PARAGRAPH_CHARS - 1).is_some());
            for paragraph in judged.take(MAX_PARAGRAPHS) {
                let chars = paragraph.chars().count();
                all += chars;
                let of = self.identify(&excerpt(paragraph), scratch).map(|(language, _)| language);
                same += if of == Some(language) { chars } else { 0 };
            }
            found.paragraph_fraction = (all > 0).then(|| same as f64 / all as f64);
        }
        found
    }
}

/// The text, or two pieces of a long one.
fn excerpt(text: &str) -> Cow<'_, str> {
    let text = text.trim();
    if text.len() <= 2 * PIECE_BYTES {
        return Cow::Borrowed(text);
    }
    let first = &text[..text.floor_char_boundary(PIECE_BYTES)];
    let middle = text.ceil_char_boundary(text.len() / 2);
    let second = &text[middle..text.floor_char_boundary(middle + PIECE_BYTES)];
    Cow::Owned(format!("{first} {second}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> DocumentLanguage {
        Identifier::Embedded.document(text, true, &mut FastTextScratch::default())
    }

    #[test]
    fn languages_of_documents_and_paragraphs() {
        let english = "All human beings are born free and equal in dignity and rights, and should act in brotherhood.";
        let german = "Alle Menschen sind frei und gleich an Würde und Rechten geboren, und sollen einander begegnen.";
        assert_eq!(of(english).language.as_deref(), Some("en"));
        assert_eq!(of(german).language.as_deref(), Some("de"));
        for (text, code) in [
            ("人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心。", "zh"),
            ("すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。", "ja"),
            ("มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ", "th"),
            ("Все люди рождаются свободными и равными в своем достоинстве и правах.", "ru"),
        ] {
            assert_eq!(of(text).language.as_deref(), Some(code));
        }
        let more = "They have reason and conscience, and nobody should be held in slavery or be treated as less than others. \
                    Everyone has the right to life, to liberty and to the security of their person.";
        let mixed = format!("{english}\n{more}\n\nshort\n{german}");
        let found = of(&mixed);
        assert_eq!(found.language.as_deref(), Some("en"));
        let chars = [english, more, german].map(|text| text.chars().count() as f64);
        let expected = (chars[0] + chars[1]) / chars.iter().sum::<f64>();
        assert_eq!(found.paragraph_fraction, Some(expected));
        assert_eq!(of(""), DocumentLanguage::default());
        assert_eq!(of("12 34 !!"), DocumentLanguage::default());
    }

    #[test]
    fn long_texts_are_judged_by_two_pieces() {
        let text = "日本語の文です。".repeat(5_000);
        assert!(excerpt(&text).len() <= 2 * PIECE_BYTES + 1);
        assert_eq!(of(&text).language.as_deref(), Some("ja"));
        assert_eq!(excerpt("  short "), "short");
    }
}
