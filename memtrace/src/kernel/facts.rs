//! Gathers the facts that a plan is made of: the only reader of the files that say what is possible
//! here.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use rustix::thread::CapabilitySet;

use super::btf::Btf;
use super::hooks::{Attach, Hook, Program};
use super::support::{KernelFacts, MemoryController, Privileges};

/// The running kernel's own BTF.
pub const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";
/// Largest BTF file that is read.
const MAX_BTF_FILE: u64 = 256 << 20;

/// Gathers everything. `btf` is a file to read instead of the kernel's own types; `cgroup` is where
/// the memory controller was found. Never fails: a fact that cannot be had is stored with the
/// reason.
pub fn gather(btf: Option<&Path>, cgroup: Result<MemoryController, String>) -> KernelFacts {
    let uname = rustix::system::uname();
    let mut facts = KernelFacts {
        kernel: uname.release().to_string_lossy().into_owned(),
        arch: uname.machine().to_string_lossy().into_owned(),
        cgroup: Some(cgroup),
        privileges: privileges(),
        lockdown: std::fs::read_to_string("/sys/kernel/security/lockdown").ok().and_then(|text| lockdown(&text)),
        ..KernelFacts::default()
    };
    let path = btf.unwrap_or_else(|| Path::new(KERNEL_BTF));
    match read_btf(path) {
        Ok(btf) => {
            facts.btf = Some(Ok(path.display().to_string()));
            describe(&mut facts, &btf);
        }
        Err(error) => facts.btf = Some(Err(format!("{}: {error}", path.display()))),
    }
    facts
}

fn read_btf(path: &Path) -> Result<Btf, String> {
    let size = std::fs::metadata(path).map_err(|error| error.to_string())?.len();
    if size > MAX_BTF_FILE {
        return Err(format!("{size} bytes are more than any kernel's BTF"));
    }
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    Btf::from_vec(bytes).map_err(|error| error.to_string())
}

/// Fills in what the kernel's types say.
pub fn describe(facts: &mut KernelFacts, btf: &Btf) {
    let (layout, missing) = btf.layout();
    facts.layout = Some(layout);
    facts.missing = missing.iter().map(|missing| format!("{} ({})", missing.field, missing.source)).collect();
    facts.tracepoints_known = btf.names_tracepoints();
    let (mut tracepoints, mut functions) = (BTreeSet::new(), BTreeMap::new());
    for program in Hook::ALL.into_iter().flat_map(Hook::programs).flat_map(Program::all) {
        match program.attach {
            Attach::RawTracepoint(name) | Attach::TypedTracepoint(name) if btf.has_tracepoint(name) => {
                tracepoints.insert(name);
            }
            Attach::RawTracepoint(_) | Attach::TypedTracepoint(_) => {}
            Attach::Fentry(function) | Attach::Fexit(function) | Attach::Kprobe(function) => {
                functions.extend(btf.func_args(function.name).map(|args| (function.name, args)));
            }
        }
    }
    facts.tracepoints = tracepoints;
    facts.functions = functions;
    facts.percpu_lookup = btf.enumerator("BPF_FUNC_map_lookup_percpu_elem").is_some();
    facts.task_pt_regs = btf.enumerator("BPF_FUNC_task_pt_regs").is_some();
}

/// What this process may do, from capget(2); nothing where that fails.
pub fn privileges() -> Privileges {
    let held = rustix::thread::capabilities(None).map_or(CapabilitySet::empty(), |held| held.effective);
    Privileges { euid: rustix::process::geteuid().as_raw(), held }
}

/// The mode in brackets of `none [integrity] confidentiality`.
fn lockdown(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::support::plan;
    use crate::of_machine;

    #[test]
    fn lockdown_is_what_stands_in_brackets() {
        assert_eq!(lockdown("none [integrity] confidentiality\n").as_deref(), Some("integrity"));
        assert_eq!(lockdown("[none] integrity").as_deref(), Some("none"));
        assert_eq!(lockdown("none"), None);
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let facts = gather(Some(Path::new("/no/such/btf")), Err("none".into()));
        assert!(facts.layout.is_none());
        assert!(facts.btf.unwrap().unwrap_err().starts_with("/no/such/btf: "));
        let text = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(text.path(), "hello, world").unwrap();
        let facts = gather(Some(text.path()), Err("none".into()));
        assert!(facts.btf.unwrap().unwrap_err().contains("not BTF"));
    }

    #[test]
    fn the_running_kernel_has_what_is_required() {
        let Some(_) = of_machine::found("types of the kernel", std::fs::metadata(KERNEL_BTF)) else { return };
        let cgroup = Ok(MemoryController { version: 2, hierarchy_id: 0, mount: String::new() });
        let facts = gather(None, cgroup);
        assert!(facts.missing.is_empty() && facts.tracepoints_known);
        let plan = plan(&facts, &[]);
        for hook in Hook::ALL.into_iter().filter(|hook| hook.need() == crate::kernel::hooks::HookNeed::Required) {
            assert!(plan.steps.iter().any(|step| step.hook == hook), "{hook}");
        }
    }
}
