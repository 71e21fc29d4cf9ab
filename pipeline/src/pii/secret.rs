//! Keys and tokens of well-known services, by their published prefixes and lengths, and private keys in PEM.

use std::ops::Range;
use std::sync::LazyLock;

use regex::Regex;

/// One alternative for each kind of key. All begin with letters that the regex engine looks for with SIMD.
const PATTERNS: [&str; 19] = [
    // Amazon Web Services
    r"\b(?:AKIA|ASIA|AGPA|AIDA|AROA|ANPA)[A-Z0-9]{16}\b",
    // GitHub
    r"\bgh[pousr]_[A-Za-z0-9]{36}\b",
    r"\bgithub_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}\b",
    // GitLab
    r"\bglpat-[A-Za-z0-9_\-]{20}\b",
    // Slack
    r"\bxox[abeoprs]-[0-9A-Za-z\-]{10,250}\b",
    r"https://hooks\.slack\.com/services/T[A-Z0-9]{6,12}/B[A-Z0-9]{6,12}/[A-Za-z0-9]{20,30}",
    // Google
    r"\bAIza[0-9A-Za-z_\-]{35}",
    // Stripe
    r"\b[sr]k_(?:live|test)_[0-9A-Za-z]{24,120}\b",
    // OpenAI and Anthropic
    r"\bsk-(?:proj-|svcacct-)?[A-Za-z0-9_\-]{20,80}T3BlbkFJ[A-Za-z0-9_\-]{20,80}",
    r"\bsk-ant-[a-z0-9]{3,10}-[A-Za-z0-9_\-]{80,120}",
    // Hugging Face
    r"\bhf_[A-Za-z]{34}\b",
    // npm and PyPI
    r"\bnpm_[A-Za-z0-9]{36}\b",
    r"\bpypi-AgEIcHlwaS5vcmc[A-Za-z0-9_\-]{50,250}",
    // SendGrid
    r"\bSG\.[A-Za-z0-9_\-]{22}\.[A-Za-z0-9_\-]{43}",
    // Twilio
    r"\bSK[0-9a-f]{32}\b",
    // DigitalOcean
    r"\bdo[oprt]_v1_[0-9a-f]{64}\b",
    // JSON Web Tokens
    r"\beyJ[A-Za-z0-9_\-]{10,}\.eyJ[A-Za-z0-9_\-]{10,}\.[A-Za-z0-9_\-]{10,}",
    // Telegram bots
    r"\b[0-9]{8,10}:AA[A-Za-z0-9_\-]{33}\b",
    // Private keys
    r"-----BEGIN (?:[A-Z]{2,10} ){0,2}PRIVATE KEY(?: BLOCK)?-----[A-Za-z0-9+/=\s:,\-]{40,}?-----END (?:[A-Z]{2,10} ){0,2}PRIVATE KEY(?: BLOCK)?-----",
];

/// Literals of which every key has one: texts without any, which is nearly all, never meet the pattern.
static HINTS: LazyLock<aho_corasick::AhoCorasick> = LazyLock::new(|| {
    #[allow(clippy::unwrap_used, reason = "constant patterns, compiled by the tests")]
    aho_corasick::AhoCorasick::new([
        "AKIA",
        "ASIA",
        "AGPA",
        "AIDA",
        "AROA",
        "ANPA",
        "ghp_",
        "gho_",
        "ghu_",
        "ghs_",
        "ghr_",
        "github_pat_",
        "glpat-",
        "xox",
        "hooks.slack",
        "AIza",
        "k_live_",
        "k_test_",
        "sk-",
        "hf_",
        "npm_",
        "pypi-",
        "SG.",
        "SK",
        "o_v1_",
        "p_v1_",
        "r_v1_",
        "t_v1_",
        "eyJ",
        ":AA",
        "PRIVATE KEY",
    ])
    .unwrap()
});

static SECRET: LazyLock<Regex> = LazyLock::new(|| {
    #[allow(clippy::unwrap_used, reason = "constant patterns, compiled by the tests")]
    regex::RegexBuilder::new(&PATTERNS.map(|p| format!("(?:{p})")).join("|"))
        .unicode(false)
        .size_limit(64 << 20)
        .dfa_size_limit(16 << 20)
        .build()
        .unwrap()
});

/// Calls `visit` with every key.
pub(super) fn find(text: &str, mut visit: impl FnMut(Range<usize>)) {
    if HINTS.is_match(text) {
        SECRET.find_iter(text).for_each(|found| visit(found.range()));
    }
}
