//! Kernel stacks of the threads whose charge failed: addresses in, names out.

use std::collections::{BTreeMap, VecDeque};

use memtrace_common::event::KernelStack;
use tracing::debug;
use zerocopy::FromBytes;

use super::kallsyms;
use crate::engine::input::Fact;

/// Kernel addresses whose names are remembered.
const MAX_NAMES: usize = 4096;
/// Kernel stacks waiting for their names.
const MAX_STACKS: usize = 1024;

/// Stacks that wait for their names, and the names known so far.
#[derive(Default)]
pub struct TriggerStacks {
    /// Cap: [`MAX_STACKS`].
    waiting: VecDeque<KernelStack>,
    /// Cap: [`MAX_NAMES`].
    names: BTreeMap<u64, Option<String>>,
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

    /// Names everything that waits: one pass over the kernel's symbols for all addresses not met before.
    pub fn take(&mut self) -> Vec<Fact> {
        let waiting = std::mem::take(&mut self.waiting);
        let mut unknown: Vec<u64> =
            waiting.iter().flat_map(addresses).filter(|address| !self.names.contains_key(address)).collect();
        unknown.sort_unstable();
        unknown.dedup();
        for part in unknown.chunks(kallsyms::MAX_ADDRESSES) {
            if self.names.len().saturating_add(part.len()) > MAX_NAMES {
                self.names.clear();
            }
            match kallsyms::names(part) {
                Ok(names) => self.names.extend(part.iter().copied().zip(names)),
                Err(error) => debug!("no names for kernel addresses: {error}"),
            }
        }
        let named = |stack: &KernelStack| Fact::KernelStack {
            victim_pid: stack.victim_tgid,
            victim_start_boot_ns: stack.victim_start_boot_ns,
            functions: failed_charge(
                addresses(stack).filter_map(|address| self.names.get(&address).cloned().flatten()).collect(),
            ),
        };
        waiting.iter().map(named).collect()
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
        assert!(stacks.take().is_empty());
    }
}
