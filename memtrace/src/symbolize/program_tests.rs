//! Stacks of real programs, compiled here: unwound and named, also after the program has died.

use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use memtrace_incident::{AllocationPath, Cause, Frame, Incident};
use memtrace_unwind::elf::ElfHeaders;
use memtrace_unwind::gate::ProcessKey;
use memtrace_unwind::maps::Maps;
use memtrace_unwind::proc_dir::ProcDir;
use memtrace_unwind::process_cache::{ProcessCache, SampleMoment};
use memtrace_unwind::rule::Registers;
use memtrace_unwind::unwind::{Truncation, UnwoundFrame, UnwoundStack};

use super::frame_names::{FrameNames, UnnamedFrames};
use super::job::NameSources;
use super::{debug_files, symbolizer};

const COPY_BYTES: usize = 60 << 10;
/// Prints its frame pointer, then waits. Not inlined, so that it is in every stack.
const WAIT: &str = r#"
    #include <stdio.h>
    #include <unistd.h>
    __attribute__((noinline, optimize("no-omit-frame-pointer"))) static int wait_here(void) {
        printf("%lx\n", (unsigned long)__builtin_frame_address(0));
        fflush(stdout);
        return pause() + 1;
    }
"#;
const DEEP: &str = r#"
    __attribute__((noinline)) int deep(int n) { return n ? deep(n - 1) + n : wait_here(); }
    int main(int argc, char **argv) { return deep(argc > 1 ? atoi(argv[1]) : 3) + 1; }
"#;

fn compile(compiler: &str, out: &Path, source: &str, flags: &[&str]) {
    let file = out.with_extension(if compiler == "g++" { "cc" } else { "c" });
    std::fs::write(&file, source).unwrap();
    let mut command = Command::new(compiler);
    command.args(["-O2", "-g", "-fomit-frame-pointer", "-fno-optimize-sibling-calls", "-w", "-Wl,--build-id"]);
    let output = command.arg(&file).arg("-o").arg(out).args(flags).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn c(out: &Path, source: &str, flags: &[&str]) {
    compile("gcc", out, &format!("#define _GNU_SOURCE\n#include <stdlib.h>\n{WAIT}{source}"), flags);
}

fn run(program: &str, args: &[&dyn AsRef<std::ffi::OsStr>]) {
    let output = Command::new(program).args(args.iter().map(|arg| arg.as_ref())).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A program that waits in `wait_here`.
struct Waiting {
    child: Child,
    tid: u32,
    frame_pointer: u64,
}

impl Waiting {
    fn start(program: &Path, args: &[&str]) -> Self {
        let child = Command::new(program).args(args).stdout(Stdio::piped()).spawn().unwrap();
        let tid = child.id();
        let mut waiting = Self { child, tid, frame_pointer: 0 };
        waiting.wait_again();
        waiting
    }

    /// Waits until it has printed its frame pointer once more.
    fn wait_again(&mut self) {
        let mut line = String::new();
        BufReader::new(self.child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        self.frame_pointer = u64::from_str_radix(line.trim(), 16).unwrap();
    }

    /// The newest thread instead of the main one.
    fn in_thread(mut self) -> Self {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        self.tid = tasks.map(|task| task.unwrap().file_name().to_str().unwrap().parse().unwrap()).max().unwrap();
        self
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn start_ns(&self) -> u64 {
        ProcDir::of(self.pid()).unwrap().start_ticks().unwrap() * 10_000_000
    }

    fn key(&self) -> ProcessKey {
        (self.pid(), self.start_ns())
    }

    /// The registers that an eBPF program would read, once the thread is blocked in a system call.
    fn registers(&self) -> Registers {
        let path = format!("/proc/{}/task/{}/syscall", self.pid(), self.tid);
        loop {
            let line = std::fs::read_to_string(&path).unwrap();
            let words: Vec<&str> = line.split_whitespace().collect();
            if words.len() == 9 && words[0] != "-1" {
                let number = |at: usize| u64::from_str_radix(words[at].trim_start_matches("0x"), 16).unwrap();
                return Registers { ip: number(8), sp: number(7), fp: self.frame_pointer, lr: None };
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    fn stack_copy(&self, sp: u64, most: usize) -> Vec<u8> {
        let mut memory = std::fs::File::open(format!("/proc/{}/mem", self.pid())).unwrap();
        memory.seek(SeekFrom::Start(sp)).unwrap();
        let mut stack_copy = vec![0; most];
        let mut length = 0;
        while let Ok(read @ 1..) = memory.read(&mut stack_copy[length..]) {
            length += read;
        }
        stack_copy.truncate(length);
        stack_copy
    }

    fn unwind(&self, processes: &mut ProcessCache) -> UnwoundStack {
        self.unwind_copy(processes, COPY_BYTES, &[])
    }

    fn unwind_copy(&self, processes: &mut ProcessCache, most: usize, chain: &[u64]) -> UnwoundStack {
        let registers = self.registers();
        let stack_copy = self.stack_copy(registers.sp, most);
        processes.unwind(SampleMoment::now(self.key()), registers, &stack_copy, chain).unwrap()
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.kill();
    }
}

fn incident_of(frames: Vec<Frame>) -> Incident {
    let path = AllocationPath {
        weight_bytes: 1,
        cause: Cause::Touch,
        process: memtrace_incident::Process { pid: 1, tid: 1, start_boot_ns: 1, comm: String::new() },
        frames,
        cut: None,
        mapped_by: None,
    };
    Incident { allocation_paths: vec![path], ..memtrace_incident::fixtures::burst() }
}

/// The frames as the incident file has them, still without names but those of code written at run
/// time.
fn frames_of(processes: &ProcessCache, stack: &UnwoundStack) -> Vec<Frame> {
    let frame = |found: &UnwoundFrame| {
        if found.jit {
            let symbol = found.name.as_ref().map(|name| name.to_string());
            return Frame { module: Some("[jit]".to_owned()), symbol, ..Frame::default() };
        }
        let (module, build_id) = found.module.and_then(|id| processes.module(id)).unzip();
        Frame { module, build_id: build_id.flatten(), offset: found.offset, ..Frame::default() }
    };
    stack.frames.iter().map(frame).collect()
}

/// As the process that names frames does it, but in this process and not confined.
fn named_with(sources: &NameSources, frames: Vec<Frame>) -> Vec<Frame> {
    let mut incident = incident_of(frames);
    let job = sources.job(&UnnamedFrames::of(&incident), usize::MAX);
    let mut found = FrameNames::default();
    let reported: Result<(), std::convert::Infallible> =
        symbolizer::find_each(debug_files::open_all(job), |module, names| {
            found.0.push((module.clone(), names));
            Ok(())
        });
    reported.unwrap();
    found.apply(&mut incident);
    incident.allocation_paths.remove(0).frames
}

fn named(processes: &ProcessCache, stack: &UnwoundStack) -> Vec<Frame> {
    named_with(&NameSources::with_modules(processes.open_modules(), &[]), frames_of(processes, stack))
}

fn symbols(frames: &[Frame]) -> Vec<&str> {
    frames.iter().map(|frame| frame.symbol.as_deref().unwrap_or("?")).collect()
}

/// Names of the frames in one file, without those of libc around them.
fn of_program(frames: &[Frame], program: &Path) -> Vec<String> {
    let path = program.canonicalize().unwrap();
    let mine = |frame: &&Frame| frame.module.as_deref() == path.to_str();
    frames.iter().filter(mine).map(|frame| frame.symbol.clone().unwrap_or("?".to_owned())).collect()
}

fn dir() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("program");
    (dir, program)
}

#[test]
fn recursion_two_hundred_deep_to_the_outermost_frame() {
    let (_dir, program) = dir();
    c(&program, DEEP, &[]);
    let waiting = Waiting::start(&program, &["200"]);
    let mut processes = ProcessCache::default();
    let stack = waiting.unwind(&mut processes);
    let frames = named(&processes, &stack);
    assert_eq!(stack.truncation, None, "{:?}", symbols(&frames));
    let names = of_program(&frames, &program);
    assert_eq!((names.len(), names[0].as_str(), names[202].as_str()), (204, "wait_here", "main"));
    assert!(names[1..202].iter().all(|name| name == "deep"), "{names:?}");
    assert_eq!(names[203], "_start");
    assert!(frames[0].module.as_ref().unwrap().contains("libc") && !frames[0].build_id.as_ref().unwrap().is_empty());
    let deep = frames.iter().find(|frame| frame.symbol.as_deref() == Some("deep")).unwrap();
    assert!(deep.file.as_ref().unwrap().ends_with("program.c") && deep.line.unwrap() > 10, "{deep:?}");
}

#[test]
fn a_stack_copy_that_is_too_short_says_so() {
    let (_dir, program) = dir();
    c(&program, DEEP, &[]);
    let waiting = Waiting::start(&program, &["200"]);
    let mut processes = ProcessCache::default();
    let stack = waiting.unwind_copy(&mut processes, 1024, &[]);
    assert_eq!(stack.truncation, Some(Truncation::StackCopy));
    assert!((10..100).contains(&stack.frames.len()));
    // The kernel's chain begins with the same frames and goes on. What follows is still unknown.
    let whole = waiting.unwind(&mut processes);
    let chain: Vec<u64> = whole.frames.iter().map(|frame| frame.address).take(127).collect();
    let joined = waiting.unwind_copy(&mut processes, 1024, &chain);
    assert_eq!(joined.truncation, Some(Truncation::StackCopy));
    assert!(joined.frames == whole.frames[..127], "{} frames", joined.frames.len());
    assert_eq!(waiting.unwind_copy(&mut processes, 0, &[]).truncation, Some(Truncation::StackCopy));
}

#[test]
fn static_and_shared_and_position_dependent() {
    let (dir, program) = dir();
    let library = dir.path().join("libdeep.so");
    compile(
        "gcc",
        &library,
        "int deep(int n, int (*f)(void)) { return n ? deep(n - 1, f) + n : f(); }",
        &["-shared", "-fPIC"],
    );
    let flags: [&[&str]; 4] =
        [&["-static-pie", "-fPIE"], &["-static"], &["-no-pie"], &["-pie", "-fPIE", "-Wl,-z,noseparate-code"]];
    for flags in flags {
        c(&program, DEEP, flags);
        let waiting = Waiting::start(&program, &["5"]);
        let mut processes = ProcessCache::default();
        let stack = waiting.unwind(&mut processes);
        let frames = named(&processes, &stack);
        let names = symbols(&frames);
        assert_eq!(stack.truncation, None, "{flags:?}: {names:?}");
        assert!(names.windows(3).any(|three| three == ["deep", "deep", "main"]), "{flags:?}: {names:?}");
    }
    let source = "int deep(int n, int (*f)(void)); int main() { return deep(5, wait_here) + 1; }";
    let path = dir.path().to_str().unwrap();
    c(&program, source, &["-L", path, "-ldeep", &format!("-Wl,-rpath,{path}")]);
    let waiting = Waiting::start(&program, &[]);
    let mut processes = ProcessCache::default();
    let stack = waiting.unwind(&mut processes);
    let frames = named(&processes, &stack);
    assert_eq!(stack.truncation, None, "{:?}", symbols(&frames));
    assert_eq!(of_program(&frames, &library), ["deep"; 6]);
    assert_eq!(of_program(&frames, &program), ["wait_here", "main", "_start"]);
}

#[test]
fn threads_signal_handlers_and_inlined_functions() {
    let (_dir, program) = dir();
    let source = r#"
        #include <pthread.h>
        #include <signal.h>
        static inline __attribute__((always_inline)) int inner(int n) { return wait_here() + n; }
        static inline __attribute__((always_inline)) int middle(int n) { return inner(n + 1) * 2; }
        __attribute__((noinline)) void handler(int signal) { exit(middle(signal)); }
        __attribute__((noinline)) int interrupted(void) { raise(SIGUSR1); return 1; }
        void *thread(void *arg) { return (void *)(long)(interrupted() + 1); }
        int main() {
            pthread_t id;
            signal(SIGUSR1, handler);
            pthread_create(&id, 0, thread, 0);
            pthread_join(id, 0);
        }
    "#;
    c(&program, source, &["-pthread"]);
    let waiting = Waiting::start(&program, &[]).in_thread();
    let mut processes = ProcessCache::default();
    let stack = waiting.unwind(&mut processes);
    let frames = named(&processes, &stack);
    assert_eq!(stack.truncation, None, "{:?}", symbols(&frames));
    assert_eq!(of_program(&frames, &program), ["wait_here", "inner", "middle", "handler", "interrupted", "thread"]);
    let inlined: Vec<bool> =
        frames.iter().skip_while(|f| f.symbol.as_deref() != Some("inner")).take(3).map(|f| f.inlined).collect();
    assert_eq!(inlined, [true, true, false]);
    let lines: Vec<u32> =
        frames.iter().skip_while(|f| f.symbol.as_deref() != Some("inner")).take(3).map(|f| f.line.unwrap()).collect();
    assert_eq!([lines[1] - lines[0], lines[2] - lines[1]], [1, 1], "{lines:?}");
}

#[test]
fn names_survive_the_process_and_its_binary() {
    let (_dir, program) = dir();
    c(&program, DEEP, &[]);
    let path = program.canonicalize().unwrap().to_str().unwrap().to_owned();
    let mut waiting = Waiting::start(&program, &["3"]);
    std::fs::remove_file(&program).unwrap();
    let mut processes = ProcessCache::default();
    let stack = waiting.unwind(&mut processes);
    let (registers, pid, start) = (waiting.registers(), waiting.pid(), waiting.start_ns());
    let stack_copy = waiting.stack_copy(registers.sp, COPY_BYTES);
    waiting.kill();
    processes.exit((pid, start));
    // A stack that was still in the ring.
    assert_eq!(processes.unwind(SampleMoment::now((pid, start)), registers, &stack_copy, &[]), Some(stack.clone()));
    let frames = named(&processes, &stack);
    let mine: Vec<&Frame> = frames.iter().filter(|frame| frame.module.as_ref() == Some(&path)).collect();
    assert_eq!(
        symbols(&mine.iter().map(|frame| (*frame).clone()).collect::<Vec<_>>()),
        ["wait_here", "deep", "deep", "deep", "deep", "main", "_start"]
    );
    // Of a process that nothing was known of.
    assert_eq!(ProcessCache::default().unwind(SampleMoment::now((pid, start)), registers, &stack_copy, &[]), None);
}

#[test]
fn a_stripped_program_is_named_by_its_debug_file_only() {
    let (dir, program) = dir();
    let apart = dir.path().join("apart");
    for flags in [&[][..], &["-static"], &["-Wl,-z,noseparate-code"], &["-no-pie"]] {
        c(&program, DEEP, flags);
        let id = ElfHeaders::read(std::fs::File::open(&program).unwrap()).unwrap().build_id.unwrap();
        let debug = apart.join(".build-id").join(&id[..2]).join(format!("{}.debug", &id[2..]));
        std::fs::create_dir_all(debug.parent().unwrap()).unwrap();
        run("objcopy", &[&"--only-keep-debug", &program, &debug]);
        run("strip", &[&program]);
        let waiting = Waiting::start(&program, &["3"]);
        let mut processes = ProcessCache::default();
        let stack = waiting.unwind(&mut processes);
        let frames = frames_of(&processes, &stack);
        assert_eq!(stack.truncation, None);
        let without = named(&processes, &stack);
        let mine = of_program(&without, &program);
        assert!(!mine.is_empty() && mine.iter().all(|name| name == "?"), "{flags:?}: {mine:?}");
        let dirs = [apart.clone()];
        // In the agent, which has the program; and elsewhere, with the debug file alone, renamed.
        let agent = named_with(&NameSources::with_modules(processes.open_modules(), &dirs), frames.clone());
        std::fs::rename(&program, dir.path().join("moved")).unwrap();
        std::fs::rename(&debug, apart.join("some.file")).unwrap();
        let elsewhere = named_with(&NameSources::with_files(&dirs), frames);
        for named in [&agent, &elsewhere] {
            let names = symbols(named);
            assert!(
                names.windows(5).any(|all| all == ["wait_here", "deep", "deep", "deep", "deep"]),
                "{flags:?}: {names:?}"
            );
        }
        std::fs::remove_dir_all(&apart).unwrap();
    }
}

#[test]
fn exceptions_templates_and_mangled_names() {
    let (_dir, program) = dir();
    let source = format!(
        "#include <stdexcept>\n#include <vector>\n{}\n{}",
        WAIT.replace("optimize(\"no-omit-frame-pointer\")", ""),
        r#"
        namespace shop {
            template <typename T> struct Cart {
                __attribute__((noinline)) T fill(T n) { try { if (n > 2) throw std::runtime_error("x"); return wait_here(); } catch (std::exception &) { return fill(n - 1) + 1; } }
            };
        }
        int main() { shop::Cart<int> cart; return cart.fill(5); }
        "#
    );
    compile("g++", &program, &source, &[]);
    let waiting = Waiting::start(&program, &[]);
    let mut processes = ProcessCache::default();
    let stack = waiting.unwind(&mut processes);
    let frames = named(&processes, &stack);
    let names = of_program(&frames, &program);
    assert_eq!(stack.truncation, None, "{names:?}");
    let fills = names.iter().filter(|name| name.starts_with("shop::Cart<int>::fill(int)")).count();
    assert!(fills >= 4 && names.contains(&"main".to_owned()), "{names:?}");
}

#[test]
fn frame_pointers_where_nothing_else_leads_on() {
    let (_dir, program) = dir();
    c(&program, DEEP, &["-fno-omit-frame-pointer", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables"]);
    let waiting = Waiting::start(&program, &["9"]);
    let mut processes = ProcessCache::default();
    let stack = waiting.unwind(&mut processes);
    let frames = named(&processes, &stack);
    let names = of_program(&frames, &program);
    assert_eq!(stack.truncation, None, "{names:?}");
    assert_eq!((names.len(), names[0].as_str(), names[11].as_str()), (13, "wait_here", "main"), "{names:?}");
}

#[test]
fn debug_frame_and_files_without_section_headers() {
    let (dir, program) = dir();
    c(&program, DEEP, &["-fno-asynchronous-unwind-tables", "-fno-unwind-tables"]);
    run("objcopy", &[&"--remove-section=.eh_frame", &"--remove-section=.eh_frame_hdr", &program]);
    let bare = dir.path().join("bare");
    c(&bare, DEEP, &[]);
    let mut bytes = std::fs::read(&bare).unwrap();
    bytes[40..48].fill(0);
    bytes[58..64].fill(0);
    std::fs::write(&bare, bytes).unwrap();
    for program in [&program, &bare] {
        let waiting = Waiting::start(program, &["9"]);
        let mut processes = ProcessCache::default();
        let stack = waiting.unwind(&mut processes);
        let frames = frames_of(&processes, &stack);
        let path = program.canonicalize().unwrap();
        let mine = frames.iter().filter(|frame| frame.module.as_deref() == path.to_str()).count();
        // Without `.eh_frame` nothing marks `_start` as the outermost.
        let least = if program == &bare { 13 } else { 12 };
        assert!(mine >= least, "{program:?}: {mine} {:?}", stack.truncation);
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn code_written_at_run_time_is_named_by_its_perf_map() {
    let (_dir, program) = dir();
    let source = r#"
        #include <string.h>
        #include <sys/mman.h>
        int main() {
            // push rbp; mov rbp, rsp; call rdi; pop rbp; ret
            unsigned char code[] = {0x55, 0x48, 0x89, 0xe5, 0xff, 0xd7, 0x5d, 0xc3};
            char *page = mmap(0, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            char name[64];
            memcpy(page, code, sizeof code);
            sprintf(name, "/tmp/perf-%d.map", getpid());
            FILE *map = fopen(name, "w");
            fprintf(map, "%lx 8 LazyCompile:*grow /app/server.js:10\n", (unsigned long)page);
            fclose(map);
            return ((int (*)(int (*)(void)))page)(wait_here) + 1;
        }
    "#;
    c(&program, source, &[]);
    let waiting = Waiting::start(&program, &[]);
    let map = format!("/tmp/perf-{}.map", waiting.pid());
    let mut processes = ProcessCache::default();
    let stack = waiting.unwind(&mut processes);
    let frames = named(&processes, &stack);
    std::fs::remove_file(map).unwrap();
    let names = symbols(&frames);
    assert_eq!(stack.truncation, None, "{names:?}");
    let jit = names.iter().position(|name| *name == "LazyCompile:*grow /app/server.js:10").unwrap();
    assert_eq!((names[jit - 1], names[jit + 1]), ("wait_here", "main"));
    assert_eq!((frames[jit].module.as_deref(), frames[jit].offset), (Some("[jit]"), None));
}

#[test]
fn a_library_that_came_later_is_found() {
    let (dir, program) = dir();
    let library = dir.path().join("libdeep.so");
    compile(
        "gcc",
        &library,
        "int deep(int n, int (*f)(void)) { return n ? deep(n - 1, f) + n : f(); }",
        &["-shared", "-fPIC"],
    );
    let source = r#"
        #include <dlfcn.h>
        #include <signal.h>
        void nothing(int signal) {}
        int main(int argc, char **argv) {
            signal(SIGUSR1, nothing);
            wait_here();
            int (*deep)(int, int (*)(void)) = dlsym(dlopen(argv[1], RTLD_NOW), "deep");
            return deep(4, wait_here) + 1;
        }
    "#;
    c(&program, source, &["-ldl"]);
    let mut waiting = Waiting::start(&program, &[library.to_str().unwrap()]);
    let mut processes = ProcessCache::default();
    assert_eq!(waiting.unwind(&mut processes).truncation, None);
    let reads = processes.counts().maps_read;
    assert_eq!((waiting.unwind(&mut processes).truncation, processes.counts().maps_read), (None, reads), "nothing new");
    run("kill", &[&"-USR1", &waiting.pid().to_string()]);
    waiting.wait_again();
    let frames = loop {
        // Mappings are read again for an unknown address, but not all the time.
        let stack = waiting.unwind(&mut processes);
        if !stack.needs_maps {
            assert_eq!(stack.truncation, None);
            break named(&processes, &stack);
        }
        assert_eq!(stack.truncation, Some(Truncation::UnknownCode));
        std::thread::sleep(std::time::Duration::from_millis(20));
    };
    assert_eq!(of_program(&frames, &library), ["deep"; 5]);
    assert_eq!(processes.counts().maps_reread, 1);
}

#[test]
fn mappings_are_read_once_for_each_program() {
    let (_dir, program) = dir();
    c(&program, DEEP, &[]);
    let waiting = Waiting::start(&program, &["3"]);
    let mut processes = ProcessCache::default();
    assert!(processes.prefetch(waiting.key()));
    assert_eq!(processes.counts().maps_read, 1);
    waiting.unwind(&mut processes);
    assert_eq!(processes.counts().maps_read, 1);
    // Word that comes late: what is cached is of the new program.
    processes.exec(waiting.key(), 5);
    waiting.unwind(&mut processes);
    assert_eq!(processes.counts().maps_read, 1);
    let exec_ns = crate::clock::boot_ns();
    processes.exec(waiting.key(), exec_ns);
    let before = SampleMoment { boot_ns: exec_ns - 1, ..SampleMoment::now(waiting.key()) };
    assert_eq!(processes.unwind(before, waiting.registers(), &[], &[]), None, "a stack of the program before");
    assert_eq!((processes.counts().maps_read, processes.counts().gone), (1, 1));
    waiting.unwind(&mut processes);
    assert_eq!(processes.counts().maps_read, 2);
    assert!(processes.memory_estimate() > 10_000);
}

#[test]
fn another_process_of_the_same_id_is_not_taken_for_it() {
    let (_dir, program) = dir();
    c(&program, DEEP, &[]);
    let waiting = Waiting::start(&program, &["3"]);
    let registers = waiting.registers();
    let mut processes = ProcessCache::default();
    let before = waiting.start_ns() - 1_000_000_000;
    assert!(!processes.prefetch((waiting.pid(), before)));
    assert_eq!(processes.unwind(SampleMoment::now((waiting.pid(), before)), registers, &[], &[]), None);
    assert_eq!(processes.counts().gone, 1);
}

#[test]
fn only_dynamic_symbols_name_only_what_they_cover() {
    let (_dir, program) = dir();
    let source = r#"
        __attribute__((noinline)) static int hidden(int n) { return n ? hidden(n - 1) + n : wait_here(); }
        __attribute__((noinline)) int exported(int n) { return hidden(n) + 1; }
        int main() { return exported(2) + 1; }
    "#;
    c(&program, source, &["-rdynamic"]);
    run("strip", &[&program]);
    let waiting = Waiting::start(&program, &[]);
    let mut processes = ProcessCache::default();
    let stack = waiting.unwind(&mut processes);
    let mut names = of_program(&named(&processes, &stack), &program);
    // gcc may give a static function a copy of its own.
    names.dedup();
    assert_eq!(names, ["?", "exported", "main", "_start"]);
}

#[test]
fn the_vdso_is_a_module() {
    let mut processes = ProcessCache::default();
    let (pid, start) =
        (std::process::id(), ProcDir::of(std::process::id()).unwrap().start_ticks().unwrap() * 10_000_000);
    let maps = Maps::parse(&std::fs::read("/proc/self/maps").unwrap());
    let vdso = maps.all().iter().find(|mapping| mapping.is_vdso()).unwrap();
    // At the first instruction of a function the return address is at the stack pointer, or in the
    // link register.
    let caller = the_vdso_is_a_module as *const () as u64 + 1;
    let stack_copy = caller.to_le_bytes();
    let mut inside = None;
    for ip in (vdso.start..vdso.end).step_by(16) {
        let registers = Registers { ip, sp: 0x7000_0000_0000, fp: 1, lr: Some(caller) };
        let stack = processes.unwind(SampleMoment::now((pid, start)), registers, &stack_copy, &[]).unwrap();
        let frames = named(&processes, &stack);
        assert_eq!(frames[0].module.as_deref(), Some("[vdso]"));
        if frames[0].symbol.as_deref().is_some_and(|name| name.contains("clock_gettime")) && frames.len() > 1 {
            inside = Some(frames);
            break;
        }
    }
    let frames = inside.unwrap();
    assert!(frames[0].build_id.is_some() && frames[0].offset.is_some());
    assert!(frames[1].module.as_ref().unwrap().contains("memtrace"), "{frames:?}");
}

#[test]
fn a_module_that_is_truncated_does_no_harm() {
    let (_dir, program) = dir();
    c(&program, DEEP, &[]);
    let waiting = Waiting::start(&program, &["3"]);
    let mut processes = ProcessCache::default();
    assert!(processes.prefetch(waiting.key()));
    let (registers, pid, start) = (waiting.registers(), waiting.pid(), waiting.start_ns());
    let stack_copy = waiting.stack_copy(registers.sp, COPY_BYTES);
    drop(waiting);
    // A program that runs cannot be written to; a library can.
    std::fs::File::options().write(true).open(&program).unwrap().set_len(100).unwrap();
    let stack = processes.unwind(SampleMoment::now((pid, start)), registers, &stack_copy, &[]).unwrap();
    assert_eq!(stack.truncation, Some(Truncation::UnwindInfo));
    assert_eq!(named(&processes, &stack)[1].symbol, None);
}
