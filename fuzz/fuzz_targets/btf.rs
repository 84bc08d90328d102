//! Any bytes as BTF: parse, then ask for everything the layout and the plan need.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memtrace::kernel::{btf::Btf, facts, hooks::Hook, support};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(btf) = Btf::parse(bytes) {
        let mut found = support::KernelFacts::default();
        facts::describe(&mut found, &btf);
        let plan = support::plan(&found, &[]);
        assert_eq!(plan.steps.len() + plan.refused.len(), Hook::ALL.len());
    }
});
