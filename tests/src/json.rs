//! Reading JSON in tests: a missing key fails with its pointer and what was there instead.

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
