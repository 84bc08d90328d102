//! `cargo xtask test`: runs every layer of tests that this machine can run, and says why the others
//! were not run.
//!
//! Lints and docs run while missing programs are installed and the eBPF programs are built. Then
//! one build makes everything else; the emulated machines boot at low priority, and the layers of
//! this machine run beside them, quick ones first.

mod history;
mod layer;
mod summary;

use std::io::Write;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use memtrace_bench::{InstructionExtent, count_instructions};
use memtrace_checks::ci;
use memtrace_harness::built::{Built, TestExecutable};
use memtrace_harness::checkout::{Checkout, Profile, has_btf, is_root};
use memtrace_harness::libtest::SecondTry;
use memtrace_harness::run::say;
use memtrace_harness::{build, host, setup};
use memtrace_vm::{Selection, Slots, prefetch, run_matrix};

use self::layer::{Layer, LayerOutcome, LayerRunner};

/// Prefixes of black-box test targets that need neither root nor eBPF.
const UNPRIVILEGED: [&str; 4] = ["cli", "golden", "replay", "report"];

/// Prefix of those that need a browser and nothing of the kernel.
const IN_BROWSER: &str = "browser_";

/// Prefix of those that would harm this machine; they only run in emulated ones.
const HARMFUL: &str = "vm_";

/// How long the simulator runs new seeds.
const SIMULATED_SECONDS: &str = "60";

/// Arguments of `cargo xtask test`.
#[derive(clap::Args)]
pub struct Args {
    /// Test the optimized build
    #[arg(long)]
    release: bool,
    /// Leave out the emulated machines, which take the longest
    #[arg(long)]
    no_vm: bool,
    /// Every test in every emulated machine, also where it is slow and hardly ever tells one kernel from another
    #[arg(long, conflicts_with = "no_vm")]
    all: bool,
    /// Take the verifier's counts into tests/kernels/verifier.txt and the table of kernels into the README
    #[arg(long, requires = "all", conflicts_with = "filter")]
    bless: bool,
    /// Only tests whose name contains this, and no checks
    filter: Option<String>,
}

/// Runs the verb.
pub fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    let begin = Instant::now();
    let checks = args.filter.is_none();
    let mut layers = Vec::new();
    if checks {
        layers.push(Layer::of_work("format, house rules, licences", || ci::quick(checkout)));
    }
    layers.extend(std::thread::scope(|scope| {
        // Installing mostly waits for the network and the disk.
        let read = scope.spawn(|| if checks { reading(checkout) } else { Vec::new() });
        let setting_up = Instant::now();
        setup::tests()?;
        let machines = if args.no_vm { Ok(()) } else { setup::machines() };
        if machines.is_ok() && !args.no_vm {
            // fetched during the build; whoever boots the machines reports what is missing
            scope.spawn(|| prefetch(checkout));
        }
        setup::bpf(checkout)?;
        let setup = Layer { took: setting_up.elapsed(), ..Layer::ended("set-up", LayerOutcome::Done) };
        let building = Instant::now();
        let object = build::ebpf(checkout)?;
        let ebpf = Layer { took: building.elapsed(), ..Layer::ended("build of the eBPF programs", LayerOutcome::Done) };
        let read = read.join().map_err(|_| anyhow!("the thread of lints and docs panicked"))?;
        let building = Instant::now();
        let built = Built::with_tests(checkout, Profile::of(args.release), &object)?;
        let build = Layer { took: building.elapsed(), ..Layer::ended("build", LayerOutcome::Done) };
        let machines = scope.spawn({
            let built = built.clone();
            move || in_machines(checkout, &built, args, machines)
        });
        let simulated = scope.spawn({
            let built = built.clone();
            move || if checks { vec![simulation(&built)] } else { Vec::new() }
        });
        let here = here(&built, args.filter.as_deref());
        let machines = machines.join().map_err(|_| anyhow!("the machines' thread panicked"))?;
        let simulated = simulated.join().map_err(|_| anyhow!("the simulator's thread panicked"))?;
        Ok::<_, anyhow::Error>([vec![setup, ebpf], read, vec![build], simulated, here?, machines].into_iter().flatten())
    })?);

    let mut summary = summary::sum_up(&layers, std::env::var("CI").is_ok_and(|ci| ci == "true"));
    if checks {
        let second_tries: Vec<SecondTry> = layers.iter().flat_map(|layer| layer.second_tries.clone()).collect();
        summary.troubles.extend(history::add(&history::file(checkout), &host::today()?, &second_tries)?);
    }
    say(format_args!("summary, {} s in all; layers in machines run beside the others", begin.elapsed().as_secs()));
    for line in &summary.lines {
        say(format_args!("{line}"));
    }
    let _ = writeln!(std::io::stdout(), "memtrace: {}", summary.total);
    if !summary.troubles.is_empty() {
        bail!("{}", summary.troubles.join("; "));
    }
    Ok(())
}

/// Checks that compile the sources. They share one build, of metadata alone.
fn reading(checkout: &Checkout) -> Vec<Layer> {
    vec![Layer::of_work("lints", || ci::lints(checkout)), Layer::of_work("docs", || ci::docs(checkout))]
}

/// Runs new kernel stories through the engine for a while. What fails prints its seed.
fn simulation(built: &Built) -> Layer {
    Layer::of_work("simulator, new seeds", || {
        let mut simulator = Command::new("nice");
        simulator.arg("-n5").arg(built.program("memtrace-sim")?).args(["--seconds", SIMULATED_SECONDS]);
        memtrace_harness::run::run(&mut simulator).context("repeat it with `cargo xtask sim --seed N`")
    })
}

/// Runs the layers of this machine.
fn here(built: &Built, filter: Option<&str>) -> Result<Vec<Layer>> {
    let runner = LayerRunner { memtrace: built.program("memtrace")?, filter };
    let Targets { units, programs, unprivileged, in_browser, in_kernel } = Targets::of(&built.tests);
    let mut layers = vec![
        runner.layer("unit and property tests", &units)?,
        runner.layer("the tests' own programs", &programs)?,
        runner.layer("black box, no privileges", &unprivileged)?,
        runner.layer("black box, in a browser", &in_browser)?,
    ];
    let name = "black box, in this kernel";
    layers.push(match cannot_trace() {
        Some(why) => Layer::ended(name, LayerOutcome::Impossible { why: why.to_owned() }),
        None => runner.kernel_layer(name, &in_kernel)?,
    });
    Ok(layers)
}

fn cannot_trace() -> Option<&'static str> {
    if !is_root() {
        Some("not root: run it as `sudo -E env PATH=$PATH cargo xtask test`")
    } else if !has_btf() {
        Some("this kernel has no BTF at /sys/kernel/btf/vmlinux")
    } else {
        None
    }
}

/// Runs the layers of emulated machines: the kernel matrix, and the machines that count
/// instructions.
fn in_machines(checkout: &Checkout, built: &Built, args: &Args, set_up: Result<()>) -> Vec<Layer> {
    let [matrix, counted] = ["the kernel matrix", "instructions"];
    if args.no_vm {
        let left_out = |name| Layer::ended(name, LayerOutcome::LeftOut { why: "as was asked for (--no-vm)" });
        return [matrix, counted].map(left_out).into();
    }
    if let Err(error) = set_up {
        let why = format!("{error:#}");
        return [matrix, counted].map(|name| Layer::ended(name, LayerOutcome::Impossible { why: why.clone() })).into();
    }
    let slots = Slots::new(None);
    std::thread::scope(|scope| {
        let matrix = scope.spawn(|| kernel_matrix(matrix, checkout, built, &slots, args));
        let counted = scope.spawn(|| instructions(counted, checkout, built, &slots, args));
        let failed = |_| vec![Layer::of_work("machines", || bail!("their thread panicked"))];
        let mut layers = matrix.join().unwrap_or_else(failed);
        layers.extend(counted.join().unwrap_or_else(failed));
        layers
    })
}

/// Runs the machines of the matrix; each is a layer.
fn kernel_matrix(name: &str, checkout: &Checkout, built: &Built, slots: &Slots, args: &Args) -> Vec<Layer> {
    let selection = if args.all { Selection::All } else { Selection::Usual };
    let machines = memtrace_vm::Args::whole(args.filter.clone(), args.bless);
    match run_matrix(checkout, built, &machines, selection, slots) {
        Ok(Some(reports)) => reports.into_iter().map(Layer::of_machine).collect(),
        Ok(None) => vec![Layer::ended(name, LayerOutcome::LeftOut { why: "none of its tests has that in its name" })],
        Err(error) => vec![Layer::ended(name, LayerOutcome::Impossible { why: format!("{error:#}") })],
    }
}

/// Counts the instructions that the agent adds to each operation and compares them with the
/// committed snapshot.
fn instructions(name: &str, checkout: &Checkout, built: &Built, slots: &Slots, args: &Args) -> Vec<Layer> {
    if args.filter.as_ref().is_some_and(|filter| !name.contains(filter.as_str())) {
        return vec![Layer::ended(name, LayerOutcome::LeftOut { why: "its name does not contain the filter" })];
    }
    let extent = if args.all { InstructionExtent::Together } else { InstructionExtent::Ends };
    let mut layer = match count_instructions(checkout, built, slots, extent, false) {
        Ok(found) => {
            for failure in &found.failures {
                say(format_args!("{name}: FAILED {failure}"));
            }
            let ended = LayerOutcome::Ran { tally: found.tally, success: found.failures.is_empty() };
            Layer { remarks: found.remarks, took: found.took, ..Layer::ended(name, ended) }
        }
        Err(error) => Layer::ended(name, LayerOutcome::Impossible { why: format!("{error:#}") }),
    };
    if extent == InstructionExtent::Ends {
        layer.remarks.push("left out: the kernels between the oldest and the newest (--all)".to_owned());
    }
    vec![layer]
}

/// Test executables grouped by what they need.
#[derive(Debug, Default)]
struct Targets<'a> {
    units: Vec<&'a TestExecutable>,
    /// Unit tests of the black-box package and of the harnesses.
    programs: Vec<&'a TestExecutable>,
    unprivileged: Vec<&'a TestExecutable>,
    in_browser: Vec<&'a TestExecutable>,
    in_kernel: Vec<&'a TestExecutable>,
}

impl<'a> Targets<'a> {
    fn of(tests: &'a [TestExecutable]) -> Self {
        let mut targets = Self::default();
        for test in tests {
            let starts = |prefix: &str| test.name.starts_with(prefix);
            let group = match test.is_black_box() {
                false if test.is_of_harness() => &mut targets.programs,
                false => &mut targets.units,
                true if starts(HARMFUL) => continue,
                true if starts(IN_BROWSER) => &mut targets.in_browser,
                true if UNPRIVILEGED.iter().any(|prefix| starts(prefix)) => &mut targets.unprivileged,
                true => &mut targets.in_kernel,
            };
            group.push(test);
        }
        targets
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_targets_need_the_kernel_and_harmful_ones_a_machine_of_their_own() {
        let test = |dir: &str, name: &str, is_target| TestExecutable {
            dir: format!("/r/{dir}").into(),
            package: dir.into(),
            name: name.to_owned(),
            is_target,
            path: format!("/t/{name}").into(),
        };
        let names = ["browser_page", "cli", "golden_v1", "kernel_oom", "something", "vm_machine"];
        let mut tests: Vec<TestExecutable> = names.iter().map(|name| test("tests", name, true)).collect();
        tests.extend([
            test("tests", "workload", false),
            test("memtrace", "memtrace", false),
            test("memtrace", "replay", true),
        ]);
        let targets = Targets::of(&tests);
        let names = |group: &[&TestExecutable]| group.iter().map(|test| test.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&targets.unprivileged), ["cli", "golden_v1"]);
        assert_eq!(names(&targets.in_browser), ["browser_page"]);
        assert_eq!(names(&targets.in_kernel), ["kernel_oom", "something"]);
        assert_eq!(names(&targets.programs), ["workload"]);
        assert_eq!(names(&targets.units), ["memtrace", "replay"]);
    }
}
