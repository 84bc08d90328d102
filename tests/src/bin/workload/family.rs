//! Workloads of several processes. Children print to the same stdout, each with its own `start`.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use memtrace_tests::process;
use rustix::process::{Resource, Rlimit, Signal, setpriority_process, setrlimit};
use serde_json::json;

use crate::{is_over, loops, memory, raw, say, wait_for_end_of_stdin};

/// Starts a child. One that waits does so until its stdin closes; its output is passed on
/// meanwhile.
fn member(comm: &str, mib: usize, wait: bool) -> anyhow::Result<Child> {
    let own = std::env::current_exe().context("failed to find this program")?;
    let mut command = Command::new(own);
    command.args(["member", "--mib", &mib.to_string(), "--comm", comm]);
    if wait {
        command.arg("--wait").stdin(Stdio::piped()).stdout(Stdio::piped());
    } else {
        command.stdin(Stdio::null());
    }
    command.spawn().context("failed to start a child")
}

/// Passes on the output of a waiting child until it is ready or gone.
fn until_ready(child: &mut Child) -> anyhow::Result<()> {
    let Some(stdout) = child.stdout.take() else { return Ok(()) };
    for line in BufReader::new(stdout).lines() {
        let line = line.context("failed to listen to a child")?;
        println!("{line}");
        if line.contains("\"ready\"") {
            break;
        }
    }
    Ok(())
}

/// Prints how a child ended.
fn reap(mut child: Child) -> anyhow::Result<()> {
    let pid = child.id();
    drop(child.stdin.take());
    let status = child.wait().context("failed to wait for a child")?;
    say("child_exit", &json!({ "child": pid, "code": status.code(), "signal": status.signal() }))
}

/// K children at once; each keeps its memory until all have theirs or are killed.
pub(crate) fn many(processes: usize, mib_each: usize) -> anyhow::Result<()> {
    let mut children: Vec<Child> =
        (0..processes).map(|_| member("many-child", mib_each, true)).collect::<anyhow::Result<_>>()?;
    children.iter_mut().try_for_each(until_ready)?;
    children.into_iter().try_for_each(reap)
}

/// A parent that stays alive while its child grows until it is done or killed.
pub(crate) fn fork_child(mib: usize) -> anyhow::Result<()> {
    let child = member("grow-child", mib, false)?;
    say("child", &json!({ "child": child.id() }))?;
    reap(child)
}

/// Parent and child each hold `mib` and do nothing.
pub(crate) fn forked(mib: usize) -> anyhow::Result<()> {
    let held = memory::touched(mib);
    let mut child = member("forked-child", mib, true)?;
    until_ready(&mut child)?;
    say("ready", &json!({ "anon_mib": mib, "child": child.id() }))?;
    wait_for_end_of_stdin()?;
    reap(child)?;
    drop(held);
    Ok(())
}

/// Forked children that share this small program's pages until they write: cheap enough for tens of
/// thousands.
pub(crate) fn crowd(processes: usize, swing: bool) -> anyhow::Result<()> {
    let mut children = Vec::with_capacity(processes);
    let forked = (0..processes).try_for_each(|_| match raw::fork()? {
        0 => stand(swing),
        child => {
            children.push(child);
            anyhow::Ok(())
        }
    });
    let waited =
        forked.and_then(|()| say("ready", &json!({ "children": children }))).and_then(|()| wait_for_end_of_stdin());
    for child in &children {
        process::signal(*child, Signal::TERM)?;
    }
    for child in children {
        raw::wait(child)?;
    }
    waited
}

/// What each child of a crowd does.
fn stand(swing: bool) -> ! {
    // no child outlives its parent
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::TERM));
    if !swing {
        raw::wait_for_the_end();
    }
    loop {
        std::thread::sleep(std::time::Duration::from_secs(1));
        if loops::swing().is_err() {
            raw::leave();
        }
    }
}

/// Short processes, up to 64 at a time: each touches `kib_each` and ends.
pub(crate) fn passing(processes: usize, kib_each: usize) -> anyhow::Result<()> {
    const AT_ONCE: usize = 64;
    let mut running = VecDeque::with_capacity(AT_ONCE);
    for _ in 0..processes {
        let child = raw::fork()?;
        if child == 0 {
            memory::touch(&mut vec![0u8; kib_each << 10]);
            raw::leave();
        }
        running.push_back(child);
        if running.len() >= AT_ONCE
            && let Some(oldest) = running.pop_front()
        {
            raw::wait(oldest)?;
        }
    }
    running.into_iter().try_for_each(|child| raw::wait(child).map(drop))
}

/// Forks, as does every child, until there are `most` processes of this user, and goes on trying.
/// Each ends by itself when the time is over.
pub(crate) fn fork_bomb(most: u64, time: Duration) -> anyhow::Result<()> {
    let begin = Instant::now();
    let limit = Rlimit { current: Some(most), maximum: Some(most) };
    setrlimit(Resource::Nproc, limit).context("failed to limit the number of processes")?;
    // the machine has other things to do
    setpriority_process(None, 19).context("failed to let others go first")?;
    if raw::fork().context("not even one process")? > 0 {
        say("attacking", &json!({}))?;
    }
    let own = std::process::id();
    while !is_over(begin, time) {
        if raw::fork().is_err() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    if std::process::id() != own {
        raw::leave();
    }
    Ok(())
}

/// Forks children that wait, and kills each.
pub(crate) fn kill_children(count: usize) -> anyhow::Result<()> {
    for _ in 0..count {
        let child = raw::fork()?;
        if child == 0 {
            raw::wait_for_the_end();
        }
        memtrace_tests::process::signal(child, rustix::process::Signal::KILL)?;
        raw::wait(child)?;
    }
    Ok(())
}
