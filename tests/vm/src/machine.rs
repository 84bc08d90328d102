//! One emulated machine: its disks, QEMU's command line, and its console from boot to end.

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
use super::tsc;
use super::watch::{EmulatorThreads, ProgressWatch, Sign};
use memtrace_harness::checkout::administrators;
use memtrace_harness::run::{output, say, shown};

/// Program that emulates the machine.
pub(crate) const QEMU: &str = "qemu-system-x86_64";

/// File in the shared directory that lists the executables the guest leaves out; read by
/// tests/vm/guest.
const LEFT_OUT: &str = "left-out";

/// CPUs of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Processors {
    /// Two CPUs, each in a NUMA node of its own, so that a cpuset can be limited to one node.
    Nodes,
    /// One CPU whose clock counts instructions: 1 ns for each, none while it idles.
    Counted {
        /// CPUs that the kernel reserves room for (possible CPUs).
        possible: u32,
    },
    /// This many CPUs in one node.
    Many(u32),
}

impl Processors {
    /// QEMU's arguments for these CPUs and for `memory` MiB.
    fn arguments(self, memory: u32) -> Vec<String> {
        let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let mut arguments = words(&format!("-cpu {}", self.model()));
        match self {
            Self::Nodes => {
                let half = memory / 2;
                // One host thread for both CPUs: as many machines run as the host has CPUs, and a
                // CPU that spins on a lock does not use up the other's time.
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

    /// QEMU's CPU model and the features to remove from it.
    fn model(self) -> &'static str {
        match self {
            // With ERMS the kernel clears and copies memory with one `rep` instruction
            // (arch/x86/lib, clear_page_erms), which the emulator executes byte by byte.
            Self::Nodes => "max,-erms,-fsrm",
            // Since 6.9 the kernel reserves room for CPUs to be added later only as a guest of a
            // known hypervisor (arch/x86/kernel/cpu/topology.c). Without KVM, QEMU can only imitate
            // VMware's: by a serial number and a port (arch/x86/kernel/cpu/vmware.c).
            Self::Counted { possible } if possible > 1 => "max,-hypervisor",
            Self::Counted { .. } | Self::Many(_) => "max",
        }
    }

    /// Kernel command line for these CPUs, on a host whose time stamp counter has this rate.
    fn words(self, tsc_khz: Option<u64>) -> String {
        let tsc = tsc_khz.map(|khz| format!("tsc_early_khz={khz} ")).unwrap_or_default();
        match self {
            // An emulated CPU does not speculate. Machines that count instructions keep the
            // mitigations.
            Self::Nodes => format!("mitigations=off {tsc}"),
            Self::Many(_) => tsc,
            // The counter stands for instructions, not for the host's.
            Self::Counted { .. } => String::new(),
        }
    }
}

/// Settings that all machines of a run share.
pub(crate) struct MachineParts {
    /// Directory for consoles and for what the machines leave behind.
    pub(crate) dir: PathBuf,
    /// Path of the archive with all programs.
    pub(crate) initramfs: PathBuf,
    /// Memory of each machine, MiB.
    pub(crate) memory: u32,
    /// CPUs of each machine.
    pub(crate) processors: Processors,
    /// Further words of the kernel command line: the guest's task.
    pub(crate) append: String,
    /// Whether to keep the disk that the tests wrote to.
    pub(crate) keep: bool,
    /// Which tests run.
    pub(crate) selection: Selection,
}

/// Rank of a machine that counts instructions: it takes less time than one with all tests, more
/// than one with few.
const COUNTED: usize = 4;

impl MachineParts {
    /// Position of a machine among those that wait for a slot: the lower, the longer it runs.
    pub(crate) fn rank(&self, machine: &EmulatedMachine) -> usize {
        match self.processors {
            Processors::Counted { .. } => COUNTED,
            Processors::Nodes | Processors::Many(_) => self.selection.left_out(machine.kernel, machine.cgroup).len(),
        }
    }
}

/// A machine to boot.
pub(crate) struct EmulatedMachine {
    /// Name of its kernel in the matrix.
    pub(crate) kernel: &'static str,
    /// Version of cgroups its memory controller is on.
    pub(crate) cgroup: CgroupVersion,
    /// Its kernel.
    pub(crate) ready: BootableKernel,
}

/// Result of running a machine.
#[derive(Debug)]
pub(crate) struct MachineOutcome {
    /// What was read from the console.
    pub(crate) said: ConsoleSummary,
    /// Run time by the host's clock.
    pub(crate) took: Duration,
    /// Run time by the machine's own clock, see [`ProgressWatch`].
    pub(crate) own: Duration,
}

impl EmulatedMachine {
    /// `KERNEL-CGROUP`, for example `6.1-v2`.
    pub(crate) fn name(&self) -> String {
        format!("{}-{}", self.kernel, self.cgroup)
    }

    /// Directory that it shares with the host.
    pub(crate) fn out(&self, parts: &MachineParts) -> PathBuf {
        parts.dir.join(self.name())
    }

    /// Boots it and reads its console until it ends or is given up.
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
        // ramfs, because pages of a tmpfs root would be reclaimed to swap and count as shared
        // memory; all CPUs have one clock here, and a kernel that distrusts the TSC falls back to
        // one that drifts
        let append = format!(
            "console=ttyS0 quiet loglevel=1 panic=-1 rootfstype=ramfs tsc=reliable \
             cgroup_enable=memory swapaccount=1 {}memtrace.cgroup={} {}",
            parts.processors.words(tsc::khz()),
            self.cgroup,
            parts.append
        );
        // interactive work on the host goes first
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

/// Image of the swap disk; never modified.
const SWAP: &str = "swap.img";

/// Image of the tests' disk as every machine finds it at boot.
const SCRATCH: &str = "scratch.img";

/// Makes the two disk images unless they exist. Called once before machines boot, because those
/// boot concurrently.
pub(crate) fn make_disks(dir: &Path) -> Result<()> {
    disk(&dir.join(SWAP), 256, administrators("mkswap").arg("--quiet"))?;
    disk(
        &dir.join(SCRATCH),
        2048,
        administrators("mke2fs").args(["-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0"]),
    )
}

/// The two disks as QEMU arguments. Writes are discarded unless `keep` names the machine whose disk
/// is to be kept.
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

/// Makes a disk image of `mib` MiB with the command `format`, unless it exists.
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

/// Interval at which the machine's progress is judged.
const LOOK: Duration = Duration::from_secs(1);

/// Most console lines that wait to be read; a guest that prints faster is slowed down.
const MOST_LINES: usize = 1024;

/// Sends the lines of a console as they come, until it closes.
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

/// Passes lines to `take` until the console closes, or kills the machine when [`ProgressWatch`]
/// gives it up. Returns the reason in the latter case.
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
            Ok(line) => take(&line).into_iter().for_each(|sign| watch.note(sign)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return None,
        }
        let since = looked.elapsed();
        if since >= LOOK {
            looked += since;
            watch.advance(threads.own(since));
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
        assert_eq!(Processors::Counted { possible: 1 }.words(Some(5)), "");
        assert_eq!(Processors::Many(64).words(Some(5)), "tsc_early_khz=5 ");
        assert_eq!(Processors::Nodes.words(None), "mitigations=off ");
    }
}
