//! Rules for source: size, names, where `unsafe` and aya live. Who may import whom is in `rooms`; purity is held by
//! Cargo, cargo-deny and the `clippy.toml` of the pure crates.

use super::code::{Line, has_word, is_all_tests, length_without_tests, lines};
use super::{File, Finding, rooms};

/// A file is one thing, and one screenful of things.
const MAX_LINES: usize = 500;

/// The binary's main file parses, dispatches and decides nothing.
const MAX_MAIN_LINES: usize = 100;

/// Names that say nothing about what is inside.
const EMPTY_NAMES: [&str; 8] = ["utils", "util", "helpers", "helper", "common", "types", "misc", "shared"];

/// Userspace files that may hold `unsafe`, one leaf each. Adding one is a decision: say why beside it.
const UNSAFE_FILES: &[&str] = &[
    // registering a ring's file descriptor for readiness
    "memtrace/src/kernel/probe.rs",
    // a cgroup by its id: open_by_handle_at(2) has no safe call
    "memtrace/src/cgroup/by_id.rs",
    // settings of the C library's allocator have no safe call
    "memtrace/src/own_process.rs",
    // a workload of the tests: clone(2), fork(2), swapon(2) and a wild read have no safe call
    "tests/src/bin/workload/raw.rs",
    // empty programs to compare with, and the kernel's clock of programs: bpf(2) has no safe call
    "tests/bench/measure/src/bpf.rs",
    // the time stamp counter has no safe reader
    "tests/vm/src/tsc.rs",
];

/// How far above an unsafe block its SAFETY comment may start.
const SAFETY_REACH: usize = 8;

/// Text that belongs to one machine or one mirror. Spelt in two so that this file passes.
const FOREIGN_TEXT: [&str; 7] = [
    concat!("/wo", "rk/"),
    concat!("crates", ".io"),
    concat!("registry.npm", "js.org"),
    concat!("pypi", ".org"),
    concat!("pythonhosted", ".org"),
    concat!("deb.debian", ".org"),
    concat!("proxy.golang", ".org"),
];

/// Checks one file.
pub(crate) fn check(file: &File) -> impl Iterator<Item = Finding> + use<> {
    let mut findings = Findings { path: file.path.clone(), found: Vec::new() };
    names(file, &mut findings);
    foreign(file, &mut findings);
    if file.path.ends_with(".rs") {
        opening(file, &mut findings);
        size(file, &mut findings);
        let code = if is_all_tests(&file.path) { Vec::new() } else { lines(&file.text) };
        for (line, message) in rooms::breaches(&file.path, &code) {
            findings.add(line, message);
        }
        loader(file, &code, &mut findings);
        unsafety(file, &code, &mut findings);
    }
    findings.found.into_iter()
}

struct Findings {
    path: String,
    found: Vec<Finding>,
}

impl Findings {
    fn add(&mut self, line: usize, message: String) {
        self.found.push(Finding { path: self.path.clone(), line, message });
    }
}

fn names(file: &File, findings: &mut Findings) {
    for part in file.path.split('/') {
        let stem = part.strip_suffix(".rs").unwrap_or(part);
        if EMPTY_NAMES.contains(&stem) {
            findings.add(1, format!("`{stem}` says nothing about what is inside: name the thing"));
        }
    }
}

fn foreign(file: &File, findings: &mut Findings) {
    if file.path.ends_with("Cargo.lock") {
        return;
    }
    for (index, line) in file.text.lines().enumerate() {
        for text in FOREIGN_TEXT {
            let named = line.match_indices(text).any(|(start, _)| {
                let before = line.get(..start).unwrap_or("");
                !before.ends_with(|c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_')
            });
            if named {
                findings.add(index + 1, format!("`{text}` belongs to one machine or one mirror"));
            }
        }
    }
}

fn opening(file: &File, findings: &mut Findings) {
    if !file.text.starts_with("//!") {
        findings.add(1, "start with a `//!` line that says what the file is".to_owned());
    }
}

fn size(file: &File, findings: &mut Findings) {
    if is_all_tests(&file.path) {
        return;
    }
    let length = length_without_tests(&file.text);
    let most = if file.path == "memtrace/src/main.rs" { MAX_MAIN_LINES } else { MAX_LINES };
    if length > most {
        findings.add(most, format!("{length} lines without tests, {most} at most: it is more than one thing"));
    }
}

fn loader(file: &File, code: &[Line], findings: &mut Findings) {
    let Some(room) = file.path.strip_prefix("memtrace/src/") else { return };
    if room.starts_with("kernel/probe") || room.starts_with("kernel/object") {
        return;
    }
    for line in code {
        if has_word(&line.code, "aya") || has_word(&line.code, "aya_log") {
            findings.add(line.number, "only kernel/probe and kernel/object name aya".to_owned());
        }
    }
}

fn unsafety(file: &File, code: &[Line], findings: &mut Findings) {
    // There every read of kernel memory is an unsafe call, and the verifier is who proves them sound.
    if file.path.starts_with("memtrace-ebpf/") {
        return;
    }
    let allowed = UNSAFE_FILES.contains(&file.path.as_str());
    let text: Vec<&str> = file.text.lines().collect();
    for line in code.iter().filter(|line| has_word(&line.code, "unsafe")) {
        if !allowed {
            findings.add(line.number, "unsafe lives in memtrace-ebpf and in named leaf files only".to_owned());
        }
        let acts = line.code.contains("unsafe {") || line.code.contains("unsafe impl");
        let above = text.get(line.number.saturating_sub(SAFETY_REACH + 1)..line.number).unwrap_or(&[]);
        if acts && !above.iter().any(|line| line.contains("SAFETY:")) {
            findings.add(line.number, "say in a `SAFETY:` comment above why this is sound".to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        check(&File { path: path.to_owned(), text: text.to_owned() }).map(|f| f.message).collect()
    }

    fn breaches(path: &str, body: &str) -> usize {
        found(path, &format!("//! What it is.\n{body}\n")).len()
    }

    #[test]
    fn a_file_says_what_it_is() {
        assert_eq!(found("a/src/b.rs", "use x;\n").len(), 1);
        assert_eq!(breaches("a/src/b.rs", "use x;"), 0);
    }

    #[test]
    fn a_file_is_short_without_its_tests() {
        assert_eq!(breaches("a/src/b.rs", &"x\n".repeat(600)), 1);
        assert_eq!(breaches("a/src/b_tests.rs", &"x\n".repeat(600)), 0);
        let tests = format!("a\n#[cfg(test)]\nmod tests {{\n{}}}", "x\n".repeat(600));
        assert_eq!(breaches("a/src/b.rs", &tests), 0);
        assert_eq!(breaches("memtrace/src/main.rs", &"x\n".repeat(120)), 1);
    }

    #[test]
    fn a_file_is_named_for_what_is_inside() {
        assert_eq!(breaches("memtrace/src/utils.rs", ""), 1);
        assert_eq!(breaches("tests/tests/common/mod.rs", ""), 1);
        assert_eq!(breaches("memtrace-common/src/event.rs", ""), 0);
    }

    #[test]
    fn aya_is_named_where_it_is_used() {
        assert_eq!(breaches("memtrace/src/agent.rs", "use aya::Ebpf;"), 1);
        assert_eq!(breaches("memtrace/src/kernel/probe.rs", "use aya::Ebpf;"), 0);
        assert_eq!(breaches("memtrace/src/kernel/probe/rings.rs", "use aya_log::EbpfLogger;"), 0);
        assert_eq!(breaches("memtrace/src/kernel/btf.rs", "use aya::Btf;"), 1);
    }

    #[test]
    fn unsafe_is_rare_and_explained() {
        assert_eq!(breaches("memtrace/src/agent.rs", "// SAFETY: no\nunsafe { x() }"), 1);
        assert_eq!(breaches("memtrace/src/kernel/probe.rs", "unsafe { x() }"), 1);
        assert_eq!(breaches("memtrace/src/kernel/probe.rs", "// SAFETY: held open\nunsafe { x() }"), 0);
        assert_eq!(breaches("memtrace/src/kernel/probe.rs", "unsafe fn x() {}"), 0);
        assert_eq!(breaches("memtrace-ebpf/src/kernel.rs", "unsafe { x() }"), 0);
    }

    #[test]
    fn nothing_names_one_machine() {
        assert_eq!(found("README.md", concat!("see /wo", "rk/notes.md")).len(), 1);
        assert_eq!(found("README.md", concat!("a/wo", "rk/flow is fine")).len(), 0);
        assert_eq!(found("deny.toml", concat!("index.crates", ".io")).len(), 1);
        assert_eq!(found("Cargo.lock", concat!("crates", ".io-index")).len(), 0);
    }
}
