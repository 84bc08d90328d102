//! Kernel stacks of the threads whose failed charge led to a kill: addresses in, names out.
//!
//! Such a stack says what the kernel wanted memory for: a page fault, a read into the page cache, a
//! socket buffer. An eBPF program takes it at the kill; its names are looked up with the next tick.

use std::collections::VecDeque;

use memtrace_common::event::KernelStack;
use memtrace_engine::input::Fact;

use super::kallsyms::KernelSymbols;

/// Stacks that wait for the names of their functions; one more is dropped.
const MAX_STACKS: usize = 1024;

/// Kernel stacks that wait for the names of their functions.
#[derive(Default)]
pub struct KernelStackQueue {
    /// Cap: [`MAX_STACKS`].
    waiting: VecDeque<KernelStack>,
}

impl KernelStackQueue {
    /// Takes a stack, if there is room.
    pub fn push(&mut self, stack: &KernelStack) {
        if self.waiting.len() < MAX_STACKS {
            self.waiting.push_back(*stack);
        }
    }

    /// Stacks that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// A fact for each stack that waits.
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

/// Drops the frames of the tracer and of the OOM killer: the rest begins with the failed charge.
fn failed_charge(functions: Vec<String>) -> Vec<String> {
    let killer = |name: &String| name.contains("oom") || name.contains("out_of_memory");
    match functions.iter().rposition(killer) {
        Some(last) => functions.into_iter().skip(last.saturating_add(1)).collect(),
        None => functions,
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros;

    use super::*;

    #[test]
    fn the_stack_begins_with_the_failed_charge() {
        let all = ["mark_oom_victim", "oom_kill_process", "mem_cgroup_out_of_memory", "try_charge_memcg", "read"];
        let left = failed_charge(all.map(str::to_owned).to_vec());
        assert_eq!(left, ["try_charge_memcg", "read"]);
    }

    #[test]
    fn stacks_beyond_the_cap_are_dropped() {
        let mut stacks = KernelStackQueue::default();
        let stack = KernelStack::new_zeroed();
        (0..=MAX_STACKS).for_each(|_| stacks.push(&stack));
        assert_eq!(stacks.take(&mut KernelSymbols::default()).len(), MAX_STACKS);
    }
}
