//! Rust source seen as code: lines with comments and strings blanked, tests set apart. A reader of
//! well-formatted source, not a parser.

/// One line of code.
pub(crate) struct Line {
    /// Counted from 1.
    pub(crate) number: usize,
    /// Comments and the insides of strings are gone.
    pub(crate) code: String,
}

/// The code of a file up to its test module.
pub(crate) fn lines(text: &str) -> Vec<Line> {
    let mut blank = Blank::Not;
    text.lines()
        .take(length_without_tests(text))
        .enumerate()
        .map(|(index, line)| Line { number: index + 1, code: strip(line, &mut blank) })
        .collect()
}

/// How many lines come before `#[cfg(test)] mod`.
pub(crate) fn length_without_tests(text: &str) -> usize {
    let mut tests = 0;
    let mut marked = None;
    let mut total = 0;
    for (index, line) in text.lines().enumerate() {
        total = index + 1;
        let line = line.trim_start();
        if line.starts_with("#[cfg(test)]") {
            marked = Some(index);
        } else if line.starts_with("#[") || line.starts_with("//") {
            // between the mark and what it marks
        } else {
            if let Some(start) = marked.take()
                && line.starts_with("mod ")
                && line.contains('{')
            {
                tests = start;
                break;
            }
        }
    }
    if tests > 0 { tests } else { total }
}

/// Whether a file is nothing but tests.
pub(crate) fn is_all_tests(path: &str) -> bool {
    let stem = path.rsplit('/').next().unwrap_or(path).trim_end_matches(".rs");
    stem == "tests" || stem.ends_with("_tests")
}

/// Whether this word stands in the code, not as part of a longer one.
pub(crate) fn has_word(code: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    code.match_indices(word).any(|(start, found)| {
        let (before, after) = (code.get(..start).unwrap_or(""), code.get(start + found.len()..).unwrap_or(""));
        !before.ends_with(is_part) && !after.starts_with(is_part)
    })
}

/// What a line starts inside of.
enum Blank {
    Not,
    Text,
    Raw(String),
    Comment,
}

fn strip(line: &str, blank: &mut Blank) -> String {
    let mut code = String::with_capacity(line.len());
    let mut rest = line;
    loop {
        match blank {
            Blank::Not => {
                let Some(start) = rest.find(['"', '/', '\'', 'r']) else {
                    code.push_str(rest);
                    return code;
                };
                let (before, from) = rest.split_at(start);
                code.push_str(before);
                let step = if from.starts_with("//") {
                    return code;
                } else if from.starts_with("/*") {
                    *blank = Blank::Comment;
                    2
                } else if let Some(hashes) = raw_string(from, &code) {
                    *blank = Blank::Raw(format!("\"{}", "#".repeat(hashes)));
                    code.push('"');
                    hashes + 2
                } else if from.starts_with('"') {
                    *blank = Blank::Text;
                    code.push('"');
                    1
                } else if let Some(length) = ["'\"'", "'\\\"'", "'/'"].iter().find(|q| from.starts_with(**q)) {
                    length.len()
                } else {
                    code.extend(from.chars().next());
                    from.chars().next().map_or(1, char::len_utf8)
                };
                rest = from.get(step..).unwrap_or("");
            }
            Blank::Text => {
                let Some(end) = rest.find(['"', '\\']) else { return code };
                let escape = rest.get(end..).is_some_and(|from| from.starts_with('\\'));
                if !escape {
                    *blank = Blank::Not;
                    code.push('"');
                }
                let skip = if escape {
                    1 + rest.get(end + 1..).and_then(|r| r.chars().next()).map_or(0, char::len_utf8)
                } else {
                    1
                };
                rest = rest.get(end + skip..).unwrap_or("");
            }
            Blank::Raw(close) => {
                let Some(end) = rest.find(close.as_str()) else { return code };
                rest = rest.get(end + close.len()..).unwrap_or("");
                code.push('"');
                *blank = Blank::Not;
            }
            Blank::Comment => {
                let Some(end) = rest.find("*/") else { return code };
                rest = rest.get(end + 2..).unwrap_or("");
                *blank = Blank::Not;
            }
        }
    }
}

/// `r"`, `r#"`, ...: the number of hashes, when this is the start of a raw string and not of a name.
fn raw_string(from: &str, before: &str) -> Option<usize> {
    if before.ends_with(|c: char| (c.is_ascii_alphanumeric() && c != 'b') || c == '_') {
        return None;
    }
    let after = from.strip_prefix('r')?;
    let text = after.trim_start_matches('#');
    text.starts_with('"').then_some(after.len() - text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(text: &str) -> Vec<String> {
        lines(text).into_iter().map(|line| line.code).collect()
    }

    #[test]
    fn comments_and_strings_are_not_code() {
        assert_eq!(code("let a = 1; // unsafe"), ["let a = 1; "]);
        assert_eq!(code("let a = \"unsafe // \\\" x\"; b"), ["let a = \"\"; b"]);
        assert_eq!(code("a /* x\ny */ b"), ["a ", " b"]);
        assert_eq!(code("let c = '\"'; unsafe"), ["let c = ; unsafe"]);
        assert_eq!(code("f(r#\"unsafe \" x\"#); g"), ["f(\"\"); g"]);
        assert_eq!(code("\"one\ntwo\" three"), ["\"", "\" three"]);
        assert_eq!(code("a / b, for<'a> &'a str"), ["a / b, for<'a> &'a str"]);
    }

    #[test]
    fn tests_are_set_apart() {
        assert_eq!(length_without_tests("a\nb\n#[cfg(test)]\nmod tests {\n}\n"), 2);
        assert_eq!(length_without_tests("a\n#[cfg(test)]\n#[path = \"x_tests.rs\"]\nmod tests;\nb\n"), 5);
        assert_eq!(length_without_tests("a\n#[cfg(test)]\nuse x;\nb\n"), 4);
        assert!(is_all_tests("memtrace/src/kernel/btf_tests.rs"));
        assert!(!is_all_tests("memtrace/src/kernel/btf.rs"));
    }

    #[test]
    fn words_are_whole() {
        assert!(has_word("unsafe {", "unsafe"));
        assert!(has_word("use aya::Ebpf", "aya"));
        assert!(!has_word("unsafe_code", "unsafe"));
        assert!(!has_word("my_aya", "aya"));
    }
}
