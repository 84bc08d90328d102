//! `docs/capabilities.md`, made from the tables of this room.

use std::fmt::Write as _;

use rustix::thread::CapabilitySet;

use super::capability::{CAPABILITIES, Capability, CapabilityNeed, names};
use super::rights::{STACK_WORKER, THREADS};
use super::syscalls::Filter;

const INTRO: &str = "\
# Capabilities

What memtrace needs to be root for, by capability, and what each part of a running agent keeps of it. This page is \
made from the tables in the code; a test compares the two, and another one starts the agent without each capability \
and holds what is lost against this page.

Start the agent as root, or as root with these capabilities only: with exactly these everything works. A container \
or a service manager that takes the others away (`CapabilityBoundingSet=` of systemd) takes nothing from memtrace. \
`memtrace doctor` says which are missing, and what is lost.

";

const AFTER: &str = "
`CAP_SYS_ADMIN` can stand in for the required ones, as before Linux 5.8; beside them it is not used.

## What is left after the start

Once the programs are attached, the agent gives up every other capability, for good: the permitted and the bounding \
set of each thread are what stands here, the inheritable and ambient sets are empty, and `no_new_privs` is set. \
*Uses* is the effective set; what is only held is for processes that the thread starts. A thread has no capability \
that the agent was not started with.

";

const CALLS: &str = "
## System calls

Threads of the agent have seccomp filters. A call that is refused fails with `EPERM`, as it would without the \
capability, and ends nothing; a call by another ABI (32 bit) ends the process. A kernel without seccomp has no filters; \
the agent logs that and runs.

- **Every thread and process**: no tracing of processes and no access to their memory by system calls, no mounts and \
namespaces, no modules, kexec, reboot, clocks, host names, keys, io_uring, userfaultfd or performance events, and of \
`bpf(2)` only elements of maps and what a descriptor is: no program is loaded or attached any more.
- **`incidents`**: also no change of a file, no program, no connection.
- **`http`**: connections that are there or come in, memory that is not executable, waiting and time. No file is \
opened, no connection made, no program run, no thread started.
- **`memtrace name-frames`**: reading what is open, memory, and its answer; anything else ends it.
";

fn set(set: CapabilitySet) -> String {
    if set.is_empty() { "none".to_owned() } else { format!("`{}`", names(set)) }
}

fn row(capability: &Capability) -> String {
    let need = match capability.need {
        CapabilityNeed::Required => "does not start",
        CapabilityNeed::Optional => "runs",
    };
    let Capability { name, used_for, lost, .. } = capability;
    format!("| `CAP_{name}` | {need} | {used_for} | {lost} |\n")
}

fn page() -> String {
    let mut page =
        format!("{INTRO}| capability | without it the agent | used for | lost without it |\n|---|---|---|---|\n");
    page.extend(CAPABILITIES.iter().map(row));
    let _ = write!(
        page,
        "{AFTER}| thread or process | what it does | holds | uses | system calls |\n|---|---|---|---|---|\n"
    );
    for thread in THREADS {
        let (holds, uses) = (set(thread.permitted), set(thread.effective));
        let _ = writeln!(
            page,
            "| `{}` | {} | {holds} | {uses} | {} |",
            thread.thread,
            thread.does,
            thread.filter.summary()
        );
    }
    let worker = set(STACK_WORKER);
    let filter = Filter::Agent.summary();
    let _ = writeln!(page, "| `memtrace stack-worker` | unwinds stacks | {worker} | {worker} | {filter} |");
    page.push_str(
        "| `memtrace name-frames` | names functions, as `nobody` | none | none | allows reading and memory only |\n",
    );
    page.push_str(CALLS);
    page
}

#[test]
fn the_page_of_capabilities_is_published() {
    crate::blessed::check("docs/capabilities.md", &page());
}
