//! Makes strings of an incident safe and short enough for a terminal.
//!
//! Names of processes, files and functions come from programs that may be hostile. Example: a
//! process named ESC `[2J` would clear the screen of the reader; it is printed as `\x1b[2J`.

use std::fmt::Write;

/// `text` with control characters, and invisible ones that reorder or hide text, escaped:
/// `\n`, `\x1b`, `\u{202e}`.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            _ if is_dangerous(character) => {
                let _ = match u32::from(character) {
                    code @ ..0x100 => write!(out, "\\x{code:02x}"),
                    code => write!(out, "\\u{{{code:x}}}"),
                };
            }
            _ => out.push(character),
        }
    }
    out
}

/// Whether the character is a control character, or an invisible one that reorders or hides text.
pub fn is_dangerous(character: char) -> bool {
    character.is_control()
        || matches!(u32::from(character),
            0xad | 0x61c | 0x180e | 0x200b..=0x200f | 0x2028..=0x202e | 0x2060..=0x206f | 0xfe00..=0xfe0f | 0xfeff
            | 0xfff9..=0xfffb | 0xe0000..=0xe0fff)
}

/// `text` escaped and, if it is longer than `width` characters, cut in the middle. Takes memory for
/// what is shown, however long `text` is.
pub fn elide(text: &str, width: usize, unicode: bool) -> String {
    // An escape has at least as many characters as what it stands for, so neither end needs more.
    let far = width.saturating_add(1).saturating_mul(2);
    let middle = match (text.char_indices().nth(far), text.char_indices().nth_back(far)) {
        (Some((head, _)), Some((tail, _))) if head < tail => text.get(..head).zip(text.get(tail..)),
        _ => None,
    };
    let text = match middle {
        Some((head, tail)) => escape(head) + &escape(tail),
        None => escape(text),
    };
    let length = text.chars().count();
    if length <= width {
        return text;
    }
    let mark = if unicode { "…" } else { "..." };
    let kept = width.saturating_sub(mark.chars().count());
    // More is kept of the end, because the end of a path identifies more.
    let head = kept * 2 / 5;
    let tail = kept - head;
    let begin: String = text.chars().take(head).collect();
    let end: String = text.chars().skip(length - tail).collect();
    format!("{begin}{mark}{end}")
}

/// `text` escaped and broken between words into lines of at most `width` characters; a longer word
/// gets a longer line.
pub fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = String::new();
    for word in unbreakable_words(&escape(text)) {
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > width {
            lines.push(std::mem::take(&mut line));
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(&word);
    }
    if !line.is_empty() {
        lines.push(line);
    }
    lines
}

/// Splits into words, but keeps a number with its unit, and a dash with the word before it.
fn unbreakable_words(text: &str) -> Vec<String> {
    const UNITS: [&str; 14] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "%", "ns", "us", "ms", "s", "min", "kB"];
    let mut words: Vec<String> = Vec::new();
    for word in text.split(' ').filter(|word| !word.is_empty()) {
        let unit = UNITS.contains(&word.trim_end_matches([',', ';', '.', ')', ':']));
        match words.last_mut() {
            Some(before) if word == "-" || (unit && before.ends_with(|last: char| last.is_ascii_digit())) => {
                before.push(' ');
                before.push_str(word);
            }
            _ => words.push(word.to_owned()),
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_dangerous_passes() {
        assert_eq!(escape("a\x1b[31mb\x07\u{9b}c\u{202e}d\ne\u{7f}"), "a\\x1b[31mb\\x07\\x9bc\\u{202e}d\\ne\\x7f");
        assert_eq!(escape("grüße 漢"), "grüße 漢");
        for code in 0..0x11_0000 {
            if let Some(character) = char::from_u32(code) {
                assert!(escape(&character.to_string()).chars().all(|c| !c.is_control()));
            }
        }
    }

    #[test]
    fn long_text_loses_its_middle() {
        assert_eq!(elide("/kubepods/pod/container", 12, true), "/kub…ntainer");
        assert_eq!(elide("/kubepods/pod/container", 12, false), "/ku...tainer");
        assert_eq!(elide("short", 12, true), "short");
        assert_eq!(elide("abc", 0, true).chars().count(), 1);
    }

    #[test]
    fn words_stay_whole() {
        assert_eq!(wrap("one two  three", 7), ["one two", "three"]);
        assert_eq!(wrap("of 450 MiB, so", 7), ["of", "450 MiB,", "so"]);
        assert_eq!(wrap("", 7), Vec::<String>::new());
        assert_eq!(wrap("averylongword x", 3), ["averylongword", "x"]);
    }
}
