//! Folded stacks, the input of flame graph tools: one line per stack, outermost frame first.
//!
//! Example: `worker-4242;main;app::load;app::Cache::fill;memset 7340032`. The number is bytes.

use std::collections::BTreeMap;

use memtrace_incident::{Cause, Incident};

use super::paths::GrowthWindow;
use super::{frames, paths, plain};

/// The stacks of one cause in a window, one a line, sorted. Kernel functions end in `_[k]`, as perf
/// marks them. For [`Cause::Touch`], growth without a stack has lines `[no stack: reason]`, so all
/// lines add up to the growth.
pub fn stacks(incident: &Incident, window: &GrowthWindow, cause: Cause) -> String {
    let mut lines: BTreeMap<String, u64> = BTreeMap::new();
    let mut add = |stack: String, bytes: u64| {
        if bytes > 0 {
            let sum = lines.entry(stack).or_default();
            *sum = sum.saturating_add(bytes);
        }
    };
    let weights = paths::weights(incident, window, cause);
    for (path, bytes) in incident.allocation_paths.iter().zip(weights).filter(|(_, bytes)| *bytes > 0) {
        let mut stack = process_part(&path.process.comm, path.process.pid);
        if let Some(cut) = path.cut {
            stack.push_str(&format!(";[cut: {}]", cut.name()));
        }
        for frame in path.frames.iter().rev() {
            stack.push(';');
            stack.push_str(&part(&frames::label(frame)));
            if frame.kernel {
                stack.push_str("_[k]");
            }
        }
        add(stack, bytes);
    }
    if cause == Cause::Touch {
        for (why, bytes) in paths::without_stack_by_reason(incident, window) {
            add(format!("[no stack: {}]", part(&why)), bytes);
        }
    }
    lines.into_iter().map(|(stack, bytes)| format!("{stack} {bytes}\n")).collect()
}

/// `worker-4242`: with the pid, so that two processes of one name stay two stacks.
fn process_part(comm: &str, pid: u32) -> String {
    format!("{}-{pid}", part(comm))
}

/// A name as one part of a line: `;` would end the part, and control characters are escaped.
fn part(name: &str) -> String {
    plain::escape(name).replace(';', ":")
}

#[cfg(test)]
mod tests {
    use memtrace_incident::fixtures;

    use super::*;

    fn sum(text: &str) -> u64 {
        text.lines().map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap()).sum()
    }

    #[test]
    fn lines_add_up_to_the_growth() {
        let burst = fixtures::burst();
        let text = stacks(&burst, &GrowthWindow::WHOLE, Cause::Touch);
        assert_eq!(sum(&text), burst.allocations.as_ref().unwrap().growth_bytes);
        let second = GrowthWindow::before(&burst, 1_000_000_000);
        let in_second = sum(&stacks(&burst, &second, Cause::Touch));
        assert!(in_second < sum(&text) && in_second > 0);
        insta::assert_snapshot!(text);
    }

    #[test]
    fn causes_are_apart() {
        let burst = fixtures::burst();
        insta::assert_snapshot!(stacks(&burst, &GrowthWindow::WHOLE, Cause::Map));
        assert_eq!(stacks(&burst, &GrowthWindow::WHOLE, Cause::Charge), "");
    }

    #[test]
    fn names_cannot_make_parts_or_lines() {
        let mut burst = fixtures::burst();
        for path in &mut burst.allocation_paths {
            path.process.comm = "a;b\nc".into();
            for frame in &mut path.frames {
                frame.symbol = Some("x;y \u{1b}[31m\n9".into());
            }
        }
        for line in
            stacks(&burst, &GrowthWindow::WHOLE, Cause::Touch).lines().filter(|line| !line.starts_with("[no stack"))
        {
            assert!(line.starts_with("a:b\\nc-"), "{line}");
            assert!(line.split(';').skip(1).all(|part| part.starts_with("x:y ") || part.starts_with("[cut")), "{line}");
        }
    }
}
