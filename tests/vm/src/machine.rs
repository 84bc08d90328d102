//! One emulated machine: its disks, QEMU's command line, and its console until it ends.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::console::{Console, ConsoleSummary};
use super::kernels::{BootableKernel, CgroupVersion};
use super::selection::Selection;
use super::watch::{EmulatorThreads, ProgressWatch, Sign};
use memtrace_harness::checkout::administrators;
use memtrace_harness::run::{output, say, shown};

/// QEMU.
pub(crate) const QEMU: &str = "qemu-system-x86_64";

/// Tells the guest which tests it leaves out: see tests/vm/guest.
const LEFT_OUT: &str = "left-out";

/// What a machine's processors are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Processors {
    /// Two, each a node of its own, so that a cpuset can be given one of them.
    Nodes,
    /// One, of which the clock counts instructions: a nanosecond each, and none while it waits. The kernel believes that
    /// there may come to be so many.
    Counted {
        /// Processors that the kernel makes room for.
        possible: u32,
    },
    /// So many, in one node.
    Many(u32),
}

impl Processors {
    /// QEMU's arguments for them, and for so many MiB of memory.
    fn arguments(self, memory: u32) -> Vec<String> {
        let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let mut arguments = words(&format!("-cpu {}", self.model()));
        match self {
            Self::Nodes => {
                let half = memory / 2;
                // One thread for both: as many machines run as there are processors, and one that waits for a lock does
                // not burn the other's time.
                arguments.extend(words(&format!("-accel tcg,thread=single -smp 2 -m {}M", half * 2)));
                for node in 0..2 {
                    arguments.extend(words(&format!("-object memory-backend-ram,id=memory{node},size={half}M")));
                    arguments.extend(words(&format!("-numa node,nodeid={node},cpus={node},memdev=memory{node}")));
                }
            }
            Self::Counted { possible } => {
                arguments.extend(words(&format!(
                    "-accel tcg,thread=single -icount shift=0,sleep=off -smp 1,maxcpus={possible} -rtc clock=vm -seed 1 \
                     -m {memory}M"
                )));
                if possible > 1 {
                    arguments.extend(words("-smbios type=1,serial=VMware-56"));
                }
            }
            Self::Many(count) => {
                arguments.extend(words(&format!("-accel tcg,thread=multi -smp {count} -m {memory}M")));
            }
        }
        arguments
    }

    /// QEMU's name of the model, and what it is to lack.
    fn model(self) -> &'static str {
        match self {
            // The kernel clears and copies memory with one instruction where that is said to be fast (arch/x86/lib,
            // clear_page_erms); the emulator does it byte by byte.
            Self::Nodes => "max,-erms,-fsrm",
            // From 6.9 on the kernel makes room for processors to come only as a guest of a hypervisor that it knows
            // (arch/x86/kernel/cpu/topology.c). Of those QEMU can look like VMware's when it only emulates: by a serial
            // number and a port (arch/x86/kernel/cpu/vmware.c).
            Self::Counted { possible } if possible > 1 => "max,-hypervisor",
            Self::Counted { .. } | Self::Many(_) => "max",
        }
    }

    /// What the kernel is told because of them.
    fn words(self) -> &'static str {
        match self {
            // An emulated processor does not speculate. Instructions are counted with everything a kernel has.
            Self::Nodes => "mitigations=off ",
            Self::Counted { .. } | Self::Many(_) => "",
        }
    }
}

/// What every machine has.
pub(crate) struct MachineParts {
    /// Where consoles and what the machines leave behind go.
    pub(crate) dir: PathBuf,
    /// The archive with everything that runs.
    pub(crate) initramfs: PathBuf,
    /// Memory, MiB.
    pub(crate) memory: u32,
    /// Its processors.
    pub(crate) processors: Processors,
    /// More of the kernel's command line: what the guest is to do.
    pub(crate) append: String,
    /// Keep the disk that the tests wrote to.
    pub(crate) keep: bool,
    /// Which tests run.
    pub(crate) selection: Selection,
}

/// Rank of a machine that counts instructions: shorter than those with all tests, longer than those with few.
const COUNTED: usize = 4;

impl MachineParts {
    /// Where a machine stands among those that wait: the lower, the longer it takes.
    pub(crate) fn rank(&self, machine: &EmulatedMachine) -> usize {
        match self.processors {
            Processors::Counted { .. } => COUNTED,
            Processors::Nodes | Processors::Many(_) => self.selection.left_out(machine.kernel, machine.cgroup).len(),
        }
    }
}

/// A machine to boot.
pub(crate) struct EmulatedMachine {
    /// Its kernel's name in the matrix.
    pub(crate) kernel: &'static str,
    /// Its memory controller's version.
    pub(crate) cgroup: CgroupVersion,
    /// Its kernel.
    pub(crate) ready: BootableKernel,
}

/// What became of it.
#[derive(Debug)]
pub(crate) struct MachineOutcome {
    /// What the console said.
    pub(crate) said: ConsoleSummary,
    /// How long it ran, by the host's clock.
    pub(crate) took: Duration,
    /// How long by its own: see [`ProgressWatch`].
    pub(crate) own: Duration,
}

impl EmulatedMachine {
    /// How it is called.
    pub(crate) fn name(&self) -> String {
        format!("{}-{}", self.kernel, self.cgroup)
    }

    /// Where it leaves files.
    pub(crate) fn out(&self, parts: &MachineParts) -> PathBuf {
        parts.dir.join(self.name())
    }

    /// Boots it and follows its console until it ends, or is ended.
    pub(crate) fn run(&self, parts: &MachineParts) -> Result<MachineOutcome> {
        let name = self.name();
        let out = self.out(parts);
        if out.exists() {
            std::fs::remove_dir_all(&out).with_context(|| format!("failed to remove {}", out.display()))?;
        }
        std::fs::create_dir_all(&out).with_context(|| format!("failed to create {}", out.display()))?;
        let left_out = parts.selection.left_out(self.kernel, self.cgroup);
        let left_out: String = left_out.iter().map(|rare| format!("{}\n", rare.executable)).collect();
        let plan = out.join(LEFT_OUT);
        std::fs::write(&plan, left_out).with_context(|| format!("failed to write {}", plan.display()))?;
        let log_path = parts.dir.join(format!("{name}.log"));
        let mut log = File::create(&log_path).with_context(|| format!("failed to create {}", log_path.display()))?;
        let disks = disks(&parts.dir, parts.keep.then_some(name.as_str()))?;

        let mut qemu = self.qemu(parts, &out, &disks);
        let _ = writeln!(log, "{}", shown(&qemu));
        let begin = Instant::now();
        let mut child = qemu.spawn().with_context(|| format!("failed to start {QEMU}"))?;
        let stdout = child.stdout.take().context("failed to take the console")?;
        let (mut console, mut watch) = (Console::default(), ProgressWatch::default());
        let given_up = follow(&mut child, lines_of(stdout), &mut watch, |line| {
            let _ = writeln!(log, "{}", line.trim_end_matches('\r'));
            let heard = console.line(line)?;
            if let Some(shown) = &heard.shown {
                say(format_args!("{name}: {:>4} s  {shown}", begin.elapsed().as_secs()));
            }
            Some(heard.sign)
        });
        let status = child.wait().with_context(|| format!("failed to wait for {QEMU}"))?;
        let cut_off = given_up.or_else(|| (!status.success()).then(|| format!("{QEMU} ended with {status}")));
        Ok(MachineOutcome { said: console.end(cut_off), took: begin.elapsed(), own: watch.own_time() })
    }

    fn qemu(&self, parts: &MachineParts, out: &Path, disks: &[String; 2]) -> Command {
        // the root is ramfs for the same reason that /tmp is a disk; all processors have one clock here, and a kernel
        // that does not trust it has a log that drifts
        let append = format!(
            "console=ttyS0 quiet loglevel=1 panic=-1 rootfstype=ramfs tsc=reliable \
             cgroup_enable=memory swapaccount=1 {}memtrace.cgroup={} {}",
            parts.processors.words(),
            self.cgroup,
            parts.append
        );
        // whoever waits for this run has the processors first
        let mut qemu = Command::new("nice");
        qemu.args(["-n", "5", QEMU]);
        qemu.args(parts.processors.arguments(parts.memory));
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]);
        qemu.arg("-kernel").arg(&self.ready.image).arg("-initrd").arg(&parts.initramfs).arg("-append").arg(append);
        for disk in disks {
            qemu.arg("-drive").arg(disk);
        }
        qemu.arg("-virtfs").arg(format!("local,path={},mount_tag=out,security_model=none", out.display()));
        qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        qemu
    }
}

/// The swap disk, which is always the same.
const SWAP: &str = "swap.img";

/// The disk that tests write to, as every machine finds it at first.
const SCRATCH: &str = "scratch.img";

/// Makes the two disks that all machines start from, unless they are there. Once, before any machine boots: machines
/// boot side by side.
pub(crate) fn make_disks(dir: &Path) -> Result<()> {
    disk(&dir.join(SWAP), 256, administrators("mkswap").arg("--quiet"))?;
    disk(
        &dir.join(SCRATCH),
        2048,
        administrators("mke2fs").args(["-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0"]),
    )
}

/// The two disks as QEMU takes them. What a machine writes is forgotten, unless its disk is to be kept.
fn disks(dir: &Path, keep: Option<&str>) -> Result<[String; 2]> {
    let drive = |path: &Path, more: &str| format!("if=virtio,format=raw,file={},{more}", path.display());
    let swap = dir.join(SWAP);
    let scratch = dir.join(SCRATCH);
    let scratch = match keep {
        None => drive(&scratch, "snapshot=on"),
        Some(name) => {
            let kept = dir.join(format!("{name}.img"));
            std::fs::copy(&scratch, &kept).with_context(|| format!("failed to write {}", kept.display()))?;
            drive(&kept, "cache=unsafe")
        }
    };
    Ok([drive(&swap, "snapshot=on"), scratch])
}

/// A disk image, unless it is there.
fn disk(path: &Path, mib: u64, format: &mut Command) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    let making = path.with_extension("making");
    let file = File::create(&making).with_context(|| format!("failed to create {}", making.display()))?;
    file.set_len(mib << 20).with_context(|| format!("failed to size {}", making.display()))?;
    output(format.arg(&making))?;
    std::fs::rename(&making, path).with_context(|| format!("failed to create {}", path.display()))
}

/// Time between two looks at a machine.
const LOOK: Duration = Duration::from_secs(1);

/// Lines that wait to be read; a guest that prints faster waits for us.
const MOST_LINES: usize = 1024;

/// The lines of a console as they come, until it closes.
fn lines_of(stdout: ChildStdout) -> Receiver<String> {
    let (sender, lines) = sync_channel(MOST_LINES);
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(std::result::Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                return;
            }
        }
    });
    lines
}

/// Takes lines until the console closes, or until the machine is given up and killed: why it was.
fn follow(
    child: &mut Child,
    lines: Receiver<String>,
    watch: &mut ProgressWatch,
    mut take: impl FnMut(&str) -> Option<Sign>,
) -> Option<String> {
    let mut threads = EmulatorThreads::of(child.id());
    let mut looked = Instant::now();
    loop {
        match lines.recv_timeout(LOOK) {
            Ok(line) => take(&line).into_iter().for_each(|sign| watch.hear(sign)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return None,
        }
        let since = looked.elapsed();
        if since >= LOOK {
            looked += since;
            watch.pass(threads.own(since));
            if let Some(why) = watch.verdict() {
                let _ = child.kill();
                return Some(why);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counted_processor_is_one_and_its_clock_stands_for_nothing_but_instructions() {
        let line = Processors::Counted { possible: 1 }.arguments(1024).join(" ");
        for part in ["-icount shift=0,sleep=off", "thread=single", "-smp 1,maxcpus=1 ", "-m 1024M", "-rtc clock=vm"] {
            assert!(line.contains(part), "{line}");
        }
        let line = Processors::Counted { possible: 64 }.arguments(1024).join(" ");
        assert!(line.contains("-cpu max,-hypervisor ") && line.contains("-smp 1,maxcpus=64 "), "{line}");
        let line = Processors::Many(64).arguments(4096).join(" ");
        assert!(line.contains("-smp 64 ") && line.contains("thread=multi") && !line.contains("-numa"), "{line}");
        let line = Processors::Nodes.arguments(1024).join(" ");
        assert!(line.contains("thread=single -smp 2 ") && line.contains("-numa node,nodeid=1,cpus=1,memdev=memory1"));
    }
}
