//! Benchmark `oomkill`: runs `kills` once more, in a machine whose kernel lets the tool `oomkill`
//! attach.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use memtrace_harness::built::Built;
use memtrace_harness::checkout::Checkout;
use memtrace_vm::BenchTask;
use memtrace_vm::Processors;
use memtrace_vm::Slots;

/// A kernel of the same suite as the host's `oomkill` package.
const KERNEL: &str = "6.1";

/// Boots the machine and adapts the chapter that the benchmark printed there.
pub(crate) fn chapter(checkout: &Checkout, built: &Built) -> Result<Value> {
    let task = BenchTask {
        name: "oomkill",
        arguments: "kills,--quick",
        kernels: &[KERNEL],
        borrowed: &["/usr/sbin/oomkill"],
        processors: Processors::Nodes,
        memory: 2048,
        slots: &Slots::new(Some(1)),
    };
    let (_, found) = task.run(checkout, built)?.into_iter().next().context("no machine was booted")?;
    let found = found?;
    let mut chapter = found.figures;
    let where_it_ran = format!(
        "The benchmark of kill recall in an emulated machine of two processors, as kprobes work there: Linux {} of Debian, \
         cgroup {}.",
        found.version, found.cgroup
    );
    let fields = chapter.as_object_mut().context("the benchmark printed no chapter")?;
    let title = fields.get("title").and_then(Value::as_str).unwrap_or("Kill recall");
    let title = format!("{title}, where oomkill can attach");
    fields.insert("title".to_owned(), json!(title));
    if let Some(text) = fields.get_mut("text").and_then(Value::as_array_mut) {
        text.insert(0, json!(where_it_ran));
    }
    Ok(chapter)
}
