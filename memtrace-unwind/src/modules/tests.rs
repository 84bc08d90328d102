//! The caps of what is known of files, and who loses what at them.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::*;

/// An ELF file with a segment, and `.eh_frame` of so many bytes in it.
fn elf_head(eh_frame_bytes: u64) -> Vec<u8> {
    const PROGRAMS: u64 = 2;
    let hdr_at = 64 + PROGRAMS * 56;
    let size = hdr_at + 12 + eh_frame_bytes;
    let machine: u16 = if cfg!(target_arch = "aarch64") { 183 } else { 62 };
    let mut head = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    [3, machine].iter().for_each(|half| head.extend(half.to_le_bytes()));
    head.extend(1_u32.to_le_bytes());
    [0_u64, 64, 0].iter().for_each(|long| head.extend(long.to_le_bytes()));
    head.extend(0_u32.to_le_bytes());
    [64_u16, 56, PROGRAMS as u16, 64, 0, 0].iter().for_each(|half| head.extend(half.to_le_bytes()));
    let programs = [(1_u32, 5_u32, 0_u64, size), (0x6474_e550, 4, hdr_at, 12)];
    for (kind, flags, offset, bytes) in programs {
        [kind, flags].iter().for_each(|word| head.extend(word.to_le_bytes()));
        [offset, offset, offset, bytes, bytes, 4096].iter().for_each(|long| head.extend(long.to_le_bytes()));
    }
    head
}

/// A mapping of a file that nobody maps: it is opened by its path.
fn mapping_of(path: &Path) -> Mapping {
    let data = std::fs::metadata(path).unwrap();
    let device = (rustix::fs::major(data.dev()), rustix::fs::minor(data.dev()));
    let path = path.to_str().unwrap().into();
    Mapping { start: 0x1000, end: 0x2000, offset: 0, device, inode: data.ino(), path }
}

/// Held by tests that have as many files open as the cap: two of those are more than a process may have.
static FILES: Mutex<()> = Mutex::new(());

/// A directory of files, and the modules that are read from it.
struct Bench {
    dir: tempfile::TempDir,
    modules: Modules,
    reader: Reader,
    made: usize,
}

impl Bench {
    fn new() -> Self {
        let dir = Arc::new(ProcDir::of(std::process::id()).unwrap());
        let credentials = Arc::new(dir.credentials().unwrap());
        let (dir, reader) = (tempfile::tempdir().unwrap(), Reader { dir, credentials });
        Self { dir, modules: Modules::default(), reader, made: 0 }
    }

    /// A name for a file with so much unwind data.
    fn file(&mut self, eh_frame_bytes: u64) -> PathBuf {
        let original = self.dir.path().join(format!("of-{eh_frame_bytes}"));
        if !original.exists() {
            let head = elf_head(eh_frame_bytes);
            std::fs::write(&original, &head).unwrap();
            let file = File::options().write(true).open(&original).unwrap();
            file.set_len(head.len() as u64 + 12 + eh_frame_bytes).unwrap();
        }
        self.made += 1;
        let path = self.dir.path().join(self.made.to_string());
        std::fs::hard_link(original, &path).unwrap();
        path
    }

    /// A module of such a file, opened on the account of this user.
    fn open(&mut self, user: u32, eh_frame_bytes: u64) -> ModuleId {
        let mapping = mapping_of(&self.file(eh_frame_bytes));
        self.modules.gate.set_process((user, 1));
        self.modules.gate.set_user(Some(user));
        match self.modules.lookup_or_insert(&self.reader, &mapping) {
            MappedModule::Read(id, _) => id,
            other => panic!("{other:?}"),
        }
    }

    /// Descriptors that this process holds in the directory.
    fn held(&self) -> usize {
        let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        links.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|at| at.starts_with(self.dir.path()))).count()
    }

    fn is_loaded(&self, id: ModuleId) -> bool {
        matches!(self.modules.get(id).unwrap().unwind, UnwindState::Read(_))
    }
}

#[test]
fn five_thousand_files_leave_no_more_modules_and_open_files_than_the_caps() {
    let _files = FILES.lock();
    let mut bench = Bench::new();
    for n in 1..=5000 {
        bench.open(1000, 16);
        let Modules { modules, ids, open, .. } = &bench.modules;
        assert!(modules.len() <= MAX_MODULES && *open <= MAX_OPEN && ids.len() == modules.len(), "{n}");
        if n % 250 == 0 {
            assert_eq!(bench.held(), *open, "{n}");
        }
    }
    let losses = bench.modules.losses();
    assert!(losses.forgotten > 0 && losses.closed > 0);
    assert_eq!(bench.modules.modules.len() as u64 + losses.forgotten, 5000);
}

#[test]
fn unwind_data_is_bounded_and_what_alone_is_too_large_is_not_read() {
    let mut bench = Bench::new();
    let large = bench.open(1000, MAX_UNWIND_BYTES as u64);
    assert!(bench.modules.unwind_data(large).is_none());
    assert_eq!((bench.modules.unwind_bytes, bench.modules.losses().too_large), (0, 1));
    for _ in 0..40 {
        let id = bench.open(1000, 1 << 20);
        assert!(bench.modules.unwind_data(id).is_some() && bench.is_loaded(id));
        assert!(bench.modules.unwind_bytes <= MAX_UNWIND_BYTES);
    }
    assert_eq!(bench.modules.losses().unloaded, 25, "15 have room");
}

#[test]
fn users_with_more_unwind_data_than_there_is_room_for_make_room_with_their_own() {
    let mut bench = Bench::new();
    let mine: Vec<ModuleId> = (0..3).map(|_| bench.open(0, 1 << 20)).collect();
    assert!(mine.iter().all(|id| bench.modules.unwind_data(*id).is_some()));
    let theirs: Vec<(u32, ModuleId)> = (0..32).map(|n| (1000 + n % 2, bench.open(1000 + n % 2, 1 << 20))).collect();
    for (user, id) in theirs.iter().chain(&theirs) {
        bench.modules.gate.set_process((*user, 1));
        bench.modules.gate.set_user(Some(*user));
        assert!(bench.modules.unwind_data(*id).is_some());
        assert!(bench.modules.unwind_bytes <= MAX_UNWIND_BYTES);
        assert!(mine.iter().all(|id| bench.is_loaded(*id)), "the third user pays for nothing again");
    }
    // One who wants all of the room gets what others leave.
    let all = bench.open(1002, (MAX_UNWIND_BYTES - 64) as u64);
    assert!(bench.modules.unwind_data(all).is_some() && !bench.is_loaded(all));
    assert!(mine.iter().all(|id| bench.is_loaded(*id)));
}

#[test]
fn a_user_with_very_many_files_closes_and_forgets_his_own() {
    let _files = FILES.lock();
    let mut bench = Bench::new();
    let mine: Vec<ModuleId> = (0..5).map(|_| bench.open(0, 16)).collect();
    for _ in 0..MAX_MODULES + 10 {
        bench.open(1000, 16);
        assert!(mine.iter().all(|id| bench.modules.get(*id).is_some_and(|module| module.file().is_some())));
    }
    assert!(bench.modules.losses().forgotten > 0);
}
