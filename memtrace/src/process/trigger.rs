//! Kernel stacks of the threads whose charge failed: addresses in, names out.

use std::collections::VecDeque;

use memtrace_common::event::KernelStack;
use zerocopy::FromBytes;

use super::kallsyms::KernelSymbols;
use memtrace_engine::input::Fact;

/// Kernel stacks waiting for their names.
const MAX_STACKS: usize = 1024;

/// Stacks that wait for their names.
#[derive(Default)]
pub struct TriggerStacks {
    /// Cap: [`MAX_STACKS`].
    waiting: VecDeque<KernelStack>,
}

impl TriggerStacks {
    /// Takes a record of the stacks ring; what is none, or one too many, is left out.
    pub fn push(&mut self, record: &[u8]) {
        if let Ok((stack, _)) = KernelStack::read_from_prefix(record)
            && self.waiting.len() < MAX_STACKS
        {
            self.waiting.push_back(stack);
        }
    }

    /// Names everything that waits.
    pub fn take(&mut self, symbols: &mut KernelSymbols) -> Vec<Fact> {
        let waiting = std::mem::take(&mut self.waiting);
        let mut named = |stack: &KernelStack| Fact::KernelStack {
            victim_pid: stack.victim_tgid,
            victim_start_boot_ns: stack.victim_start_boot_ns,
            functions: failed_charge(addresses(stack).filter_map(|address| symbols.name(address)).collect()),
        };
        waiting.iter().map(&mut named).collect()
    }
}

fn addresses(stack: &KernelStack) -> impl Iterator<Item = u64> {
    stack.addresses.iter().take(stack.frames as usize).copied().filter(|address| *address != 0)
}

/// Leaves out the tracer and the OOM killer itself: what is left begins with the charge that failed.
fn failed_charge(functions: Vec<String>) -> Vec<String> {
    let killer = |name: &String| name.contains("oom") || name.contains("out_of_memory");
    match functions.iter().rposition(killer) {
        Some(last) => functions.into_iter().skip(last.saturating_add(1)).collect(),
        None => functions,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stack_begins_with_the_failed_charge() {
        let all = ["mark_oom_victim", "oom_kill_process", "mem_cgroup_out_of_memory", "try_charge_memcg", "read"];
        let left = failed_charge(all.map(str::to_owned).to_vec());
        assert_eq!(left, ["try_charge_memcg", "read"]);
    }

    #[test]
    fn what_is_no_stack_is_left_out() {
        let mut stacks = TriggerStacks::default();
        stacks.push(&[1, 2, 3]);
        assert!(stacks.take(&mut KernelSymbols::default()).is_empty());
    }
}
