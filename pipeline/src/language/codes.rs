//! Codes of languages.

/// The code of a language as documents have it: ISO 639-1 where there is one, else ISO 639-3. Takes labels of fastText
/// models too: `__label__en`, `__label__deu_Latn`. Individual languages that stand for their macrolanguage (Mandarin for
/// Chinese, Bokmål for Norwegian) have its code.
pub fn code_of(label: &str) -> &str {
    let label = label.strip_prefix("__label__").unwrap_or(label);
    let language = label.split(['_', '-']).next().unwrap_or(label);
    match THREE_TO_TWO.binary_search_by_key(&language, |(three, _)| three) {
        Ok(at) => THREE_TO_TWO[at].1,
        Err(_) if language == "nb" => "no",
        Err(_) => language,
    }
}

/// ISO 639-3 and ISO 639-1, ascending.
#[rustfmt::skip]
static THREE_TO_TWO: [(&str, &str); 207] = [
    ("aar", "aa"), ("abk", "ab"), ("afr", "af"), ("aka", "ak"), ("als", "sq"), ("amh", "am"), ("ara", "ar"),
    ("arb", "ar"), ("arg", "an"), ("asm", "as"), ("ava", "av"), ("ave", "ae"), ("aym", "ay"), ("ayr", "ay"),
    ("aze", "az"), ("azj", "az"), ("bak", "ba"), ("bam", "bm"), ("bel", "be"), ("ben", "bn"), ("bis", "bi"),
    ("bod", "bo"), ("bos", "bs"), ("bre", "br"), ("bul", "bg"), ("cat", "ca"), ("ces", "cs"), ("cha", "ch"),
    ("che", "ce"), ("chu", "cu"), ("chv", "cv"), ("cmn", "zh"), ("cor", "kw"), ("cos", "co"), ("cre", "cr"),
    ("cym", "cy"), ("dan", "da"), ("deu", "de"), ("div", "dv"), ("dzo", "dz"), ("ekk", "et"), ("ell", "el"),
    ("eng", "en"), ("epo", "eo"), ("est", "et"), ("eus", "eu"), ("ewe", "ee"), ("fao", "fo"), ("fas", "fa"),
    ("fij", "fj"), ("fin", "fi"), ("fra", "fr"), ("fry", "fy"), ("ful", "ff"), ("fuv", "ff"), ("gaz", "om"),
    ("gla", "gd"), ("gle", "ga"), ("glg", "gl"), ("glv", "gv"), ("grn", "gn"), ("gug", "gn"), ("guj", "gu"),
    ("hat", "ht"), ("hau", "ha"), ("hbs", "sh"), ("heb", "he"), ("her", "hz"), ("hin", "hi"), ("hmo", "ho"),
    ("hrv", "hr"), ("hun", "hu"), ("hye", "hy"), ("ibo", "ig"), ("ido", "io"), ("iii", "ii"), ("ike", "iu"),
    ("iku", "iu"), ("ile", "ie"), ("ina", "ia"), ("ind", "id"), ("ipk", "ik"), ("isl", "is"), ("ita", "it"),
    ("jav", "jv"), ("jpn", "ja"), ("kal", "kl"), ("kan", "kn"), ("kas", "ks"), ("kat", "ka"), ("kau", "kr"),
    ("kaz", "kk"), ("khk", "mn"), ("khm", "km"), ("kik", "ki"), ("kin", "rw"), ("kir", "ky"), ("kmr", "ku"),
    ("kom", "kv"), ("kon", "kg"), ("kor", "ko"), ("kua", "kj"), ("kur", "ku"), ("lao", "lo"), ("lat", "la"),
    ("lav", "lv"), ("lim", "li"), ("lin", "ln"), ("lit", "lt"), ("ltz", "lb"), ("lub", "lu"), ("lug", "lg"),
    ("lvs", "lv"), ("mah", "mh"), ("mal", "ml"), ("mar", "mr"), ("mkd", "mk"), ("mlg", "mg"), ("mlt", "mt"),
    ("mon", "mn"), ("mri", "mi"), ("msa", "ms"), ("mya", "my"), ("nau", "na"), ("nav", "nv"), ("nbl", "nr"),
    ("nde", "nd"), ("ndo", "ng"), ("nep", "ne"), ("nld", "nl"), ("nno", "nn"), ("nob", "no"), ("nor", "no"),
    ("npi", "ne"), ("nya", "ny"), ("oci", "oc"), ("oji", "oj"), ("ori", "or"), ("orm", "om"), ("ory", "or"),
    ("oss", "os"), ("pan", "pa"), ("pbt", "ps"), ("pes", "fa"), ("pli", "pi"), ("plt", "mg"), ("pol", "pl"),
    ("por", "pt"), ("pus", "ps"), ("que", "qu"), ("quy", "qu"), ("roh", "rm"), ("ron", "ro"), ("run", "rn"),
    ("rus", "ru"), ("sag", "sg"), ("san", "sa"), ("sin", "si"), ("slk", "sk"), ("slv", "sl"), ("sme", "se"),
    ("smo", "sm"), ("sna", "sn"), ("snd", "sd"), ("som", "so"), ("sot", "st"), ("spa", "es"), ("sqi", "sq"),
    ("srd", "sc"), ("srp", "sr"), ("ssw", "ss"), ("sun", "su"), ("swa", "sw"), ("swe", "sv"), ("swh", "sw"),
    ("tah", "ty"), ("tam", "ta"), ("tat", "tt"), ("tel", "te"), ("tgk", "tg"), ("tgl", "tl"), ("tha", "th"),
    ("tir", "ti"), ("ton", "to"), ("tsn", "tn"), ("tso", "ts"), ("tuk", "tk"), ("tur", "tr"), ("twi", "tw"),
    ("uig", "ug"), ("ukr", "uk"), ("urd", "ur"), ("uzb", "uz"), ("uzn", "uz"), ("ven", "ve"), ("vie", "vi"),
    ("vol", "vo"), ("wln", "wa"), ("wol", "wo"), ("xho", "xh"), ("ydd", "yi"), ("yid", "yi"), ("yor", "yo"),
    ("zha", "za"), ("zho", "zh"), ("zsm", "ms"), ("zul", "zu"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_become_codes() {
        for (label, code) in [
            ("__label__en", "en"),
            ("__label__deu_Latn", "de"),
            ("cmn", "zh"),
            ("nob", "no"),
            ("nb", "no"),
            ("nno", "nn"),
            ("zho_Hans", "zh"),
            ("zh-Hant", "zh"),
            ("ceb", "ceb"),
            ("__label__ceb_Latn", "ceb"),
            ("", ""),
        ] {
            assert_eq!(code_of(label), code, "{label}");
        }
        assert_eq!(code_of(whatlang::Lang::Nob.code()), "no", "the code that its stop words have");
        assert!(THREE_TO_TWO.is_sorted_by_key(|(three, _)| three));
    }
}
