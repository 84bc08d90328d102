//! Reads JSON in tests. Errors name the pointer and show what was there.

use anyhow::Context;
use serde_json::Value;

/// The value at a JSON pointer.
pub fn at<'a>(value: &'a Value, pointer: &str) -> anyhow::Result<&'a Value> {
    value.pointer(pointer).with_context(|| format!("no {pointer} in {}", excerpt(value)))
}

/// The unsigned number at a JSON pointer.
pub fn number(value: &Value, pointer: &str) -> anyhow::Result<u64> {
    let found = at(value, pointer)?;
    found.as_u64().with_context(|| format!("{pointer} is not an unsigned number but {found}"))
}

/// The text at a JSON pointer.
pub fn text<'a>(value: &'a Value, pointer: &str) -> anyhow::Result<&'a str> {
    let found = at(value, pointer)?;
    found.as_str().with_context(|| format!("{pointer} is not text but {found}"))
}

/// The array at a JSON pointer.
pub fn list<'a>(value: &'a Value, pointer: &str) -> anyhow::Result<&'a [Value]> {
    let found = at(value, pointer)?;
    found.as_array().map(Vec::as_slice).with_context(|| format!("{pointer} is not an array but {found}"))
}

/// The first kilobyte of a value, for messages.
pub fn excerpt(value: &Value) -> String {
    let whole = value.to_string();
    whole.chars().take(1024).collect()
}

/// The incident without symbol names: a replay knows module offsets only.
pub fn without_names(incident: &Value) -> Value {
    let mut incident = incident.clone();
    let paths = incident.pointer_mut("/allocation_paths").and_then(Value::as_array_mut);
    for frames in paths.into_iter().flatten().filter_map(|path| path.get_mut("frames")?.as_array_mut()) {
        frames.retain(|frame| frame.get("inlined") != Some(&Value::Bool(true)));
        for frame in frames.iter_mut().filter(|frame| frame.get("offset").is_some_and(Value::is_u64)) {
            for name in ["symbol", "file", "line"] {
                if let Some(value) = frame.get_mut(name) {
                    *value = Value::Null;
                }
            }
        }
    }
    incident
}
