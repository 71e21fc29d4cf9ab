//! Stop words by language: small words that running text is full of and lists, menus and code are not.
//!
//! The first eight of each list take the place of Gopher's eight English ones. Words are compared in lower case or
//! capitalised, without the punctuation at their ends; Gopher's are compared exactly, as its rule has it.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use super::words;

/// The stop words of one language.
#[derive(Debug)]
pub struct StopWords {
    /// Open addressing: a byte of the hash of a word, never 0, which is a free slot. So few bytes stay near the processor,
    /// and nearly every word that is not in the list ends here.
    tags: Vec<u8>,
    /// Beside each tag: the hash.
    keys: Vec<u64>,
    /// Beside each key: [`LISTED`] and the bit of one of the first eight words.
    values: Vec<u16>,
}

/// The word is in the list.
const LISTED: u16 = 0x100;

impl StopWords {
    /// The list of a language by its ISO 639-1 or 639-3 code; for a language without a list an empty one, which no
    /// text has a word of. None is English.
    pub fn of(language: Option<&str>) -> &'static Self {
        static ALL: LazyLock<BTreeMap<&str, StopWords>> =
            LazyLock::new(|| LISTS.iter().map(|(code, _, words)| (*code, StopWords::new(words))).collect());
        static NONE: LazyLock<StopWords> = LazyLock::new(|| StopWords::new(""));
        let code = language.unwrap_or("en");
        let code = LISTS.iter().find(|(two, three, _)| *two == code || *three == code).map_or(code, |(two, ..)| *two);
        ALL.get(code).unwrap_or(&NONE)
    }

    fn new(words: &str) -> Self {
        let size = (words.split_whitespace().count() * 8).next_power_of_two().max(16);
        let mut list = Self { tags: vec![0; size], keys: vec![0; size], values: vec![0; size] };
        for (place, word) in words.split_whitespace().enumerate() {
            let bit = if place < 8 { 1 << place } else { 0 };
            list.insert(word, LISTED | bit);
            let mut letters = word.chars();
            let capitalised: String = letters.next().into_iter().flat_map(char::to_uppercase).chain(letters).collect();
            if capitalised != word {
                list.insert(&capitalised, LISTED);
            }
        }
        list
    }

    fn insert(&mut self, word: &str, value: u16) {
        let hash = words::hash(word.as_bytes());
        let mut at = hash as usize & (self.keys.len() - 1);
        while self.tags[at] != 0 && self.keys[at] != hash {
            at = (at + 1) & (self.keys.len() - 1);
        }
        self.tags[at] = tag(hash);
        self.keys[at] = hash;
        self.values[at] |= value;
    }

    #[inline]
    fn get(&self, hash: u64) -> u16 {
        let mut at = hash as usize & (self.tags.len() - 1);
        loop {
            match self.tags[at] {
                0 => return 0,
                found if found == tag(hash) && self.keys[at] == hash => return self.values[at],
                _ => at = (at + 1) & (self.tags.len() - 1),
            }
        }
    }

    /// What the list says of a word by its hash: a bit if it is exactly one of the first eight, and whether it is in the
    /// list.
    #[inline]
    pub(super) fn look_up(&self, hash: u64) -> (u8, bool) {
        let found = self.get(hash);
        (found as u8, found != 0)
    }

    /// Whether `text[from..to]` is in the list once the ASCII punctuation at its ends is off.
    pub(super) fn has_core(&self, text: &[u8], from: usize, to: usize) -> bool {
        let word = &text[from..to];
        let plain = |b: &u8| b.is_ascii_alphanumeric() || *b >= 0x80;
        let Some(start) = word.iter().position(plain) else { return false };
        let end = word.iter().rposition(plain).map_or(word.len(), |n| n + 1);
        // No stop word is longer.
        end - start <= 24 && self.get(words::hash_within(text, from + start, from + end)) != 0
    }
}

/// A byte of a hash that is not 0.
fn tag(hash: u64) -> u8 {
    (hash >> 56) as u8 | 1
}

/// ISO 639-1 and 639-3 codes, and the words.
#[rustfmt::skip]
const LISTS: [(&str, &str, &str); 27] = [
    ("en", "eng", "the be to of and that have with a an in is it for on as was are at by this from or not but his her they you we he she i which were had has their its been will would there all one no so if when what who do did can my our your them him me than then into out up about more other some such only also could should may"),
    ("de", "deu", "der die das und in zu den nicht ist von mit dem des ein eine einer eines einem einen im auf für sich es an als auch er sie wir ich ihr so nach wie aus bei aber oder wenn nur werden wird war hat sind noch über um am haben bis durch vor man dass zum zur was kann"),
    ("fr", "fra", "de la le et les des en un une du que à dans il qui est pour ne pas sur au ce se par plus avec son sa ses aux ou mais nous vous je elle ils on été être avoir a ont sont cette ces tout comme si leur y même où dont fait"),
    ("es", "spa", "de la que el en y a los se del las un por con no una su para es al lo como más o pero sus le ha me si sin sobre este ya entre cuando todo esta ser son dos también fue había era muy años hasta desde nos mi porque qué sólo yo él hay"),
    ("it", "ita", "di e il la che in un a per è una sono non con del si da al le dei i lo gli della nel ma come anche più se o alla delle dal ha su questo quando ci mi era ho essere loro suo sua perché cosa nella tra fu io lui lei noi"),
    ("pt", "por", "de a o que e do da em um para é com não uma os no se na por mais as dos como mas foi ao ele das tem à seu sua ou ser quando muito há nos já está eu também só pelo pela até isso ela entre era depois sem mesmo aos seus quem nas me"),
    ("nl", "nld", "de van het een en in is dat op te zijn met voor niet aan er die om ook als dan maar bij of uit nog naar heeft hij ze wordt door over wat al zo meer kan was worden tot deze wel mijn haar ik je we hun geen ons daar hem u"),
    ("sv", "swe", "och i att det som en på är av för med till den har de inte om ett han men var jag sig från vi så kan när hon nu skulle där eller mot efter vid hade ut ska mycket under man blir ej dem detta vara sin alla"),
    ("da", "dan", "og i at det er en til af som på de med han den for ikke der var et jeg har om vi sig men fra hun nu så kan når skal havde eller efter ud ind ved blev over op hvad hvor alle også noget være denne mit"),
    ("no", "nor", "og i det er på en som til av at for med han de ikke den har jeg om et men så var seg vi fra hun kan når nå skal hadde eller etter ut ved ble over opp hva hvor alle også noe være denne dette sin"),
    ("fi", "fin", "ja on ei että oli se hän joka mutta kuin ovat niin myös kun ole sen tai jos nyt vain olen mitä minä sitä hänen mikä tämä ne siitä olisi vielä sekä kanssa jo voi ollut sitten koska jonka siinä me he"),
    ("pl", "pol", "i w na z do się nie że to jest o a jak po co ale tak za od jego przez dla tym już był przy czy tylko jeszcze jej był było ich być może są który która które ten ta gdy go mu oraz pod przed"),
    ("cs", "ces", "a v na se že je z s do to o jako za by ale pro jsou od po tak však jeho které který která není byl bylo byla jen nebo při už jsem až jak co když ve tím k i si aby mezi"),
    ("hu", "hun", "a az és hogy nem is egy de volt ez meg csak már még mint van azt ki ha vagy el mert én ő mi minden kell lehet után ezt azonban fel úgy aki nagy be majd így akkor sem"),
    ("ro", "ron", "de și în a la cu o nu pe un din să este mai ca care se pentru că sau prin dar au fi sunt fost ale al lui ei le ce după fără între era am i-a această acest cum"),
    ("ru", "rus", "и в не на что он с как а по это но она к из у за то от его же все я о так было бы ты вы мы они для только еще ее мне был уже до или когда если быть была были нет чтобы этот может"),
    ("uk", "ukr", "і в не на що з та як а до у він це за по його від але я вона про для так було її ми ви вони які який яка або якщо був була були ще коли бути тільки вже від цей може"),
    ("bg", "bul", "и на да в се за от с не е че са по като но си го ще до му това той те ми при или ни ли един една беше след към така само още бе има може ги която който които"),
    ("el", "ell", "και το να του η της με που την από για είναι ο τα στο δεν στην θα τον οι τους των στη ότι μια ένα σε αυτό κι αλλά ή ήταν έχει μου σας μας αν όπως τις στα πολύ έναν μόνο"),
    ("tr", "tur", "ve bir bu da de için ile olarak çok daha olan gibi ne o ama en kadar sonra var her ben mi değil ki ise diye veya ya iki şey sen biz onun olduğu göre bunu ancak oldu hiç"),
    ("ar", "ara", "في من على أن إلى عن التي هذا لا ما كان مع الذي هذه بعد بين أو ذلك كل قد هو هي لم إن كما ثم لقد حتى غير عند كانت وقد منذ عليه فيه منها"),
    ("fa", "fas", "و در به از که این را با است برای آن یک خود تا کرد بر هم نیز شده می شد باید او ما اما یا هر بود دارد شود آنها بین پس اگر همه چه کند"),
    ("he", "heb", "של את על לא הוא זה עם כי היא גם או אני אם כל יש אבל הם מה רק אל היה כדי עוד בין לפי אחד יותר הזה שלו אין כך עד"),
    ("hi", "hin", "के में की है और से का को पर यह इस कि ने हैं एक लिए भी नहीं कर था तो हो ही जो गया वह या थे कुछ अपने साथ उस तक ये दिया बाद थी किया"),
    ("id", "ind", "yang dan di untuk dengan dari pada ini itu dalam tidak akan ke adalah oleh juga atau ada karena sebagai tersebut mereka saya telah bisa dapat kami lebih kita anda sudah saat seperti hanya bahwa"),
    ("vi", "vie", "và của là có cho không được với các trong một những người này đã khi từ đến để ra về như tôi cũng sẽ vào trên nhiều lại hay năm đó rất phải theo sau"),
    ("ca", "cat", "de la i que el en a les els un per amb una del no es al com més o va ser són ha dels però seu seva pel si també aquest aquesta entre quan han sobre molt on fins hi"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn look(list: &StopWords, word: &str) -> (u8, bool) {
        let (first, listed) = list.look_up(words::hash(word.as_bytes()));
        (first, listed || list.has_core(word.as_bytes(), 0, word.len()))
    }

    #[test]
    fn words_are_found_as_gopher_and_as_running_text_has_them() {
        let english = StopWords::of(None);
        assert_eq!(look(english, "the"), (1, true));
        assert_eq!(look(english, "with"), (128, true));
        assert_eq!(look(english, "The"), (0, true));
        assert_eq!(look(english, "the."), (0, true));
        assert_eq!(look(english, "“the”"), (0, false), "quotes beyond ASCII stay");
        assert_eq!(look(english, "(from,"), (0, true));
        for no in ["THE", "theirs", "", ".", "the's", "cat"] {
            assert_eq!(look(english, no), (0, false), "{no}");
        }
    }

    #[test]
    fn every_list_has_eight_first_words_and_is_found_by_both_codes() {
        for (two, three, words) in LISTS {
            let list = StopWords::of(Some(two));
            assert!(std::ptr::eq(list, StopWords::of(Some(three))));
            let bits = words.split_whitespace().take(8).map(|word| look(list, word).0).fold(0, |all, bit| all | bit);
            assert_eq!(bits, 255, "{two}");
            assert!(words.split_whitespace().all(|word| look(list, word).1 && word.len() <= 24), "{two}");
        }
        let russian = StopWords::of(Some("ru"));
        assert_eq!(look(russian, "Это"), (0, true));
        assert_eq!(look(StopWords::of(Some("xx")), "the"), (0, false));
    }
}
