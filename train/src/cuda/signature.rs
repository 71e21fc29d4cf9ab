//! What parameters a kernel takes, read from its source: arguments are checked against it, since
//! the driver itself takes any bytes.

use burn::tensor::DType;

/// One parameter of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Parameter {
    /// `T*`, or `const T*` where `read_only`; of any element where the type is not a plain one.
    Pointer { element: Option<DType>, read_only: bool },
    /// A value.
    Scalar(Scalar),
    /// `const __grid_constant__ CUtensorMap`.
    Tiles,
    /// `const __grid_constant__ View`.
    Strided,
}

/// Types of values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scalar {
    U32,
    I32,
    U64,
    I64,
    F32,
}

/// The parameters of `__global__ void entry(...)` in `text`.
///
/// # Errors
/// What keeps them from being read: no such kernel, or a type that has no counterpart here.
pub(super) fn parameters(text: &str, entry: &str) -> Result<Vec<Parameter>, String> {
    let text = without_comments(text);
    let list = parameter_list(&text, entry).ok_or_else(|| format!("no `__global__` function {entry}"))?;
    let list = list.trim();
    if list.is_empty() || list == "void" {
        return Ok(Vec::new());
    }
    list.split(',')
        .map(|text| parameter(text).ok_or_else(|| format!("{entry}: unknown parameter `{}`", text.trim())))
        .collect()
}

/// The names of all kernels in `text`.
pub(super) fn entries(text: &str) -> Vec<String> {
    let text = without_comments(text);
    let heads = text.match_indices("__global__").map(|(at, _)| {
        let head = &text[at..];
        &head[..head.find(['{', ';']).unwrap_or(head.len())]
    });
    // The name stands before the last list that begins outside of another.
    let names = heads.filter_map(|head| {
        let mut depth = 0;
        let begin = head.char_indices().rev().find_map(|(at, c)| {
            depth += match c {
                ')' => 1,
                '(' => -1,
                _ => 0,
            };
            (c == '(' && depth == 0).then_some(at)
        })?;
        let before = head[..begin].trim_end();
        Some(before[before.trim_end_matches(is_word).len()..].to_owned())
    });
    names.collect()
}

fn without_comments(text: &str) -> String {
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    let mut text = lines.collect::<Vec<_>>().join("\n");
    while let Some(begin) = text.find("/*") {
        let end = text[begin..].find("*/").map_or(text.len(), |end| begin + end + 2);
        text.replace_range(begin..end, " ");
    }
    text
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

fn parameter_list<'a>(text: &'a str, entry: &str) -> Option<&'a str> {
    text.match_indices("__global__").find_map(|(at, _)| {
        // The declaration ends where its body or a semicolon begins.
        let head = &text[at..];
        let head = &head[..head.find(['{', ';']).unwrap_or(head.len())];
        head.match_indices(entry).find_map(|(at, _)| {
            let before = head[..at].chars().next_back();
            let rest = head[at + entry.len()..].trim_start();
            let list = rest.strip_prefix('(')?;
            if before.is_some_and(is_word) {
                return None;
            }
            list.rfind(')').map(|end| &list[..end])
        })
    })
}

fn parameter(text: &str) -> Option<Parameter> {
    let (kind, pointer) = match text.rsplit_once('*') {
        Some((kind, _)) => (kind, true),
        // The last word is the name.
        None => (text.trim_end().trim_end_matches(is_word), false),
    };
    let words: Vec<&str> = kind.split(|c: char| !is_word(c)).filter(|word| !word.is_empty()).collect();
    let read_only = words.contains(&"const");
    let plain = |word: &&str| !matches!(*word, "const" | "__restrict__" | "__grid_constant__");
    let words: Vec<&str> = words.into_iter().filter(plain).collect();
    let kind = words.join(" ");
    if pointer {
        let element = match kind.as_str() {
            "float" => Some(DType::F32),
            "double" => Some(DType::F64),
            "bf16" | "__nv_bfloat16" | "nv_bfloat16" => Some(DType::BF16),
            "half" | "__half" => Some(DType::F16),
            "u32" | "unsigned" | "unsigned int" | "uint32_t" => Some(DType::U32),
            "int" | "i32" | "int32_t" => Some(DType::I32),
            "u8" | "unsigned char" | "uint8_t" => Some(DType::U8),
            _ => None,
        };
        return Some(Parameter::Pointer { element, read_only });
    }
    Some(match kind.as_str() {
        "float" => Parameter::Scalar(Scalar::F32),
        "u32" | "unsigned" | "unsigned int" | "uint32_t" => Parameter::Scalar(Scalar::U32),
        "int" | "i32" | "int32_t" => Parameter::Scalar(Scalar::I32),
        "u64" | "unsigned long long" | "size_t" | "uint64_t" => Parameter::Scalar(Scalar::U64),
        "i64" | "long long" | "int64_t" => Parameter::Scalar(Scalar::I64),
        "CUtensorMap" | "TensorMap" => Parameter::Tiles,
        "View" => Parameter::Strided,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_read_from_the_source() {
        let text = r#"
            // extern "C" __global__ void add(int not_this);
            __device__ float add(float x) { return x; }
            extern "C" __global__ void add_all(int a) {}
            /* __global__ void add(float) */
            extern "C" __global__ void __launch_bounds__(256, 2)
            add(const bf16* __restrict__ x, float *y, /* of y */ unsigned int n, const float scale,
                const uint4* any, long long stride, const __grid_constant__ CUtensorMap map) {
              if (n) { y[0] = x[0]; }
            }
            extern "C" __global__ void nothing() {}
        "#;
        let pointer = |element, read_only| Parameter::Pointer { element, read_only };
        assert_eq!(
            parameters(text, "add").unwrap(),
            [
                pointer(Some(DType::BF16), true),
                pointer(Some(DType::F32), false),
                Parameter::Scalar(Scalar::U32),
                Parameter::Scalar(Scalar::F32),
                pointer(None, true),
                Parameter::Scalar(Scalar::I64),
                Parameter::Tiles,
            ]
        );
        assert_eq!(parameters(text, "nothing").unwrap(), []);
        assert_eq!(entries(text), ["add_all", "add", "nothing"]);
        assert!(parameters(text, "ad").unwrap_err().contains("no `__global__` function ad"));
        let odd = "__global__ void odd(float3 x) {}";
        assert!(parameters(odd, "odd").unwrap_err().contains("float3 x"));
    }
}
