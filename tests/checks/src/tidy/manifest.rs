//! Rules for Cargo.toml: every dependency is in the workspace manifest, with its reason.

use super::{File, Finding};

/// Checks one file; others than manifests pass.
pub(crate) fn check(file: &File) -> Vec<Finding> {
    let is_manifest = file.path == "Cargo.toml" || file.path.ends_with("/Cargo.toml");
    // fuzz/ is a workspace of its own, as cargo-fuzz wants it; tests/truth/rust/ has what programs ship with
    if !is_manifest || ["fuzz/", "tests/truth/rust/"].iter().any(|own| file.path.starts_with(own)) {
        return Vec::new();
    }
    let mut findings = Vec::new();
    let mut section = "";
    let mut explained = false;
    for (index, line) in file.text.lines().enumerate() {
        let line = line.trim();
        if line.starts_with('#') {
            explained = true;
            continue;
        }
        if line.starts_with('[') {
            section = line;
        } else if let Some(message) = judge(section, line, explained) {
            findings.push(Finding { path: file.path.clone(), line: index + 1, message });
        }
        explained = false;
    }
    findings
}

fn judge(section: &str, line: &str, explained: bool) -> Option<String> {
    let (name, value) = line.split_once('=')?;
    let name = name.trim();
    if !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
        return None;
    }
    if section == "[workspace.dependencies]" {
        let ours = value.contains("path =");
        (!ours && !explained).then(|| format!("`{name}` has no reason: say in a comment above it what it is for"))
    } else if section.ends_with("dependencies]") {
        let shared = name.ends_with(".workspace") || value.contains("workspace = true");
        (!shared).then(|| format!("`{name}`: name its version and reason in the workspace manifest"))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(path: &str, text: &str) -> usize {
        check(&File { path: path.to_owned(), text: text.to_owned() }).len()
    }

    #[test]
    fn a_dependency_says_what_it_is_for() {
        assert_eq!(count("Cargo.toml", "[workspace.dependencies]\n# the command line\nclap = \"4\"\n"), 0);
        assert_eq!(count("Cargo.toml", "[workspace.dependencies]\n# one\nclap = \"4\"\nanyhow = \"1\"\n"), 1);
        assert_eq!(count("Cargo.toml", "[workspace.dependencies]\nours = { path = \"ours\" }\n"), 0);
        assert_eq!(count("Cargo.toml", "[workspace.package]\nversion = \"1\"\n"), 0);
    }

    #[test]
    fn members_take_versions_from_the_workspace() {
        assert_eq!(count("a/Cargo.toml", "[dependencies]\nclap.workspace = true\n"), 0);
        assert_eq!(count("a/Cargo.toml", "[dependencies]\nclap = { workspace = true, optional = true }\n"), 0);
        assert_eq!(count("a/Cargo.toml", "[dev-dependencies]\nclap = \"4\"\n"), 1);
        assert_eq!(count("a/Cargo.toml", "[target.'cfg(unix)'.dependencies]\nclap = \"4\"\n"), 1);
        assert_eq!(count("fuzz/Cargo.toml", "[dependencies]\nlibfuzzer-sys = \"0.4\"\n"), 0);
    }
}
