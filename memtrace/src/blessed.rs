//! Documentation that is generated: a test compares the file with what the code says, or writes it.

/// Compares `path`, from the root of the repository, with `text`. With `MEMTRACE_BLESS` in the environment it is
/// written instead.
pub(crate) fn check(path: &str, text: &str) {
    let file = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join(path);
    if std::env::var_os("MEMTRACE_BLESS").is_some() {
        std::fs::write(&file, text).unwrap();
    }
    assert!(
        std::fs::read_to_string(&file).unwrap_or_default() == text,
        "{path} is out of date: MEMTRACE_BLESS=1 cargo test -p memtrace --lib published"
    );
}
