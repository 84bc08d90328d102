//! Who may take from whom inside a crate. Between crates Cargo holds the direction; between the rooms
//! of one crate it is held here, by reading `use` trees and paths, however they are written:
//! `use crate::{store, cli}`, `use super::super::store`, `crate::store::read()`.

use super::code::Line;

/// A crate whose rooms stand on floors: a room takes from lower floors only, never from one beside it.
struct House {
    /// Where its source is.
    src: &'static str,
    /// From the ground up.
    floors: &'static [&'static [&'static str]],
}

const HOUSES: [House; 2] = [
    House {
        src: "memtrace/src/",
        floors: &[
            &["error", "clock", "own_process"],
            &["kernel"],
            &["cgroup", "proc", "stacks", "symbolize", "store", "serve"],
            &["host"],
            &["session"],
            &["agent"],
            &["cli"],
        ],
    },
    House {
        src: "memtrace-engine/src/",
        floors: &[
            &["clock", "decode", "input", "losses", "output"],
            &["run"],
            &["world"],
            &["growth"],
            &["build"],
            &["oom", "limits"],
            &["engine", "preamble", "snapshot"],
        ],
    },
];

/// Each line that takes from a room which the file's own must not take from, with what is wrong.
pub(super) fn breaches(path: &str, code: &[Line]) -> Vec<(usize, String)> {
    let Some(house) = HOUSES.iter().find(|house| path.starts_with(house.src)) else { return Vec::new() };
    let module = module_path(path.strip_prefix(house.src).unwrap_or(path));
    let Some(room) = module.first() else { return Vec::new() };
    let floor_of = |room: &str| house.floors.iter().position(|rooms| rooms.contains(&room));
    let Some(floor) = floor_of(room) else { return Vec::new() };
    let mut found: Vec<(usize, String)> = Vec::new();
    for (number, path) in paths(code) {
        let Some(other) = room_of(&path, &module).filter(|other| other != room) else { continue };
        let Some(theirs) = floor_of(&other) else { continue };
        let message = if theirs == floor {
            format!("rooms beside one another do not import one another: `{room}` takes `{other}`")
        } else if theirs > floor {
            format!("`{room}` stands below `{other}` and takes nothing from it")
        } else {
            continue;
        };
        if !found.iter().any(|(at, known)| *at == number && *known == message) {
            found.push((number, message));
        }
    }
    found
}

/// `oom/scope.rs` is the module `oom::scope`, `oom/mod.rs` and `oom.rs` are `oom`.
fn module_path(file: &str) -> Vec<String> {
    let parts = file.trim_end_matches(".rs").split('/').filter(|part| !["mod", "lib", "main"].contains(part));
    parts.map(str::to_owned).collect()
}

/// The room that a path leads to, from inside a module.
fn room_of(path: &[String], module: &[String]) -> Option<String> {
    if path.first()? == "crate" {
        return path.get(1).cloned();
    }
    let ups = path.iter().take_while(|part| *part == "super").count();
    if ups == 0 || ups < module.len() {
        return None;
    }
    path.get(ups).cloned()
}

/// Every path that begins with `crate` or `super`, with the line it is on.
fn paths(code: &[Line]) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    let mut lines = code.iter();
    while let Some(line) = lines.next() {
        let text = line.code.trim_start();
        let text = text.strip_prefix("pub").map_or(text, |rest| rest.split_once(") ").map_or(rest, |(_, rest)| rest));
        let Some(tree) = text.trim_start().strip_prefix("use ") else {
            found.extend(mentioned(&line.code).map(|path| (line.number, path)));
            continue;
        };
        let mut tree = tree.to_owned();
        while !tree.contains(';') {
            let Some(next) = lines.next() else { break };
            tree.push_str(next.code.trim());
        }
        let mut leaves = Vec::new();
        flatten(tree.split(';').next().unwrap_or(""), &[], &mut leaves);
        found.extend(leaves.into_iter().map(|path| (line.number, path)));
    }
    found
}

/// Paths in an expression or type.
fn mentioned(code: &str) -> impl Iterator<Item = Vec<String>> + '_ {
    let is_path = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let words =
        code.split(move |c| !is_path(c)).filter(|word| word.starts_with("crate::") || word.starts_with("super::"));
    words.map(|word| word.split("::").map(str::to_owned).collect())
}

/// The leaves of a `use` tree.
fn flatten(tree: &str, prefix: &[String], leaves: &mut Vec<Vec<String>>) {
    let tree = tree.trim();
    if let Some(list) = tree.strip_prefix('{') {
        let list = list.strip_suffix('}').unwrap_or(list);
        split_list(list).into_iter().for_each(|part| flatten(part, prefix, leaves));
        return;
    }
    let (first, rest) = tree.split_once("::").unwrap_or((tree, ""));
    let first = first.split_whitespace().next().unwrap_or("").to_owned();
    if first.is_empty() {
        return;
    }
    let path: Vec<String> = prefix.iter().cloned().chain([first]).collect();
    if rest.is_empty() {
        leaves.push(path);
    } else {
        flatten(rest, &path, leaves);
    }
}

/// Splits at the commas that are in no braces.
fn split_list(list: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut from) = (Vec::new(), 0usize, 0);
    for (at, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.extend(list.get(from..at));
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.extend(list.get(from..));
    parts
}

#[cfg(test)]
mod tests {
    use super::super::code::lines;
    use super::*;

    fn count(path: &str, text: &str) -> usize {
        breaches(path, &lines(text)).len()
    }

    #[test]
    fn nothing_takes_from_a_floor_above() {
        let cases = [
            ("memtrace/src/session.rs", "use crate::cli::STATE_DIR;", 1),
            ("memtrace/src/session/stack_pipeline.rs", "use crate::{\n    clock,\n    agent::{a, b},\n};", 1),
            ("memtrace/src/session.rs", "use crate::error::CommandError;\nuse crate::host;", 0),
            ("memtrace/src/agent/recovery.rs", "use crate::cli;\nuse crate::session::Session;", 1),
            ("memtrace/src/clock.rs", "fn f() -> crate::host::Host { x }", 1),
            ("memtrace/src/cli/doctor.rs", "use crate::agent;\nuse crate::host;", 0),
            ("memtrace-engine/src/world/mod.rs", "use crate::oom::Oom;", 1),
            ("memtrace-engine/src/world/view.rs", "use super::super::limits;", 1),
            ("memtrace-engine/src/world/view.rs", "use super::Point;", 0),
            ("memtrace-engine/src/limits/mod.rs", "pub(crate) use crate::{build::Scene, oom};", 1),
            ("memtrace-engine/src/oom/mod.rs", "use crate::build::{Draft, Scene};", 0),
            ("memtrace-engine/src/lib.rs", "use engine::Engine;", 0),
            ("elsewhere/src/a.rs", "use crate::cli;", 0),
        ];
        for (path, text, expected) in cases {
            assert_eq!(count(path, text), expected, "{path}: {text}");
        }
    }

    #[test]
    fn rooms_beside_one_another_do_not_import_one_another() {
        assert_eq!(count("memtrace/src/serve/mod.rs", "use crate::store::Store;"), 1);
        assert_eq!(count("memtrace/src/stacks/x.rs", "use crate::{proc::y, symbolize::z};"), 2);
        assert_eq!(count("memtrace/src/store/mod.rs", "use crate::store::x;"), 0);
        assert_eq!(count("memtrace/src/agent.rs", "use crate::store::Store;"), 0);
    }
}
