//! The files that code was mapped from, each met once: their names outlive their processes, and while a descriptor is
//! held so does what is in them, though the file was deleted and its container is gone.

use std::collections::{HashMap, hash_map::Entry as Slot};
use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cfi::{Cfi, Index, Machine};
use super::elf::{Headers, Segment, Unusable, Unwind};
use super::maps::{Mapping, Maps};
use super::proc_dir::{FileStamp, ProcDir};

/// Modules that are remembered; beyond it the one that was not met for longest is forgotten.
pub const MAX_MODULES: usize = 4096;
/// Descriptors that are held.
pub const MAX_OPEN: usize = 512;
/// Bytes of unwind sections that are held, of all modules; one that has more alone is not unwound.
pub const MAX_UNWIND_BYTES: usize = 16 << 20;
/// File systems that are remembered.
const MAX_FILE_SYSTEMS: usize = 1024;
/// A descriptor that nobody needed for so long is closed: it keeps a deleted file's space, and an image's.
const IDLE: Duration = Duration::from_mins(10);
/// A vdso is two pages.
const MAX_VDSO_BYTES: u64 = 64 << 10;

/// A module, for as long as the agent runs: never given to another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModuleId(pub u32);

/// A module.
#[derive(Debug)]
pub struct Module {
    /// Path as the process had it; `[vdso]`.
    pub path: Arc<str>,
    /// Build id, lower-case hex.
    pub build_id: Option<Arc<str>>,
    /// `None`: the file could not be opened, or is no ELF file of this machine.
    headers: Option<Arc<Headers>>,
    /// It was opened, and is no ELF file: what is executed in it was written at run time.
    written: bool,
    /// The content, while it is held.
    file: Option<Arc<File>>,
    key: Key,
    unwind: UnwindState,
    /// Order of use, for eviction.
    used: u64,
    met: Instant,
}

impl Module {
    /// Is it no ELF file, so that what is executed in it was written at run time?
    pub fn is_written(&self) -> bool {
        self.written
    }

    /// Could it be read, but is not held any more?
    pub fn is_closed(&self) -> bool {
        self.headers.is_some() && self.file.is_none()
    }

    /// Its headers, when it could be read.
    pub fn headers(&self) -> Option<&Arc<Headers>> {
        self.headers.as_ref()
    }

    /// Its content, while a descriptor is held.
    pub fn file(&self) -> Option<&Arc<File>> {
        self.file.as_ref()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    File(FileStamp, Arc<str>),
    /// Could not be opened: device and inode as /proc/PID/maps has them.
    Unopened((u32, u32), u64, Arc<str>),
    Vdso,
}

#[derive(Debug)]
enum UnwindState {
    Unread,
    /// There is none, or too much.
    Nothing,
    Read(Arc<UnwindData>),
}

/// What a module says about its frames; shared by all processes that map it.
#[derive(Debug)]
pub struct UnwindData {
    /// Headers of the module.
    pub headers: Arc<Headers>,
    unwind: Unwind,
    index: Option<Index>,
}

impl UnwindData {
    /// Call frame information over it.
    pub fn cfi(&self) -> Cfi<'_> {
        Cfi::new(&self.headers, &self.unwind, self.index.as_ref(), Machine::HERE)
    }

    /// Reads and indexes the unwind sections of a module; `None` when it has none or more than `most_bytes`.
    pub fn read(headers: Arc<Headers>, file: impl Read + Seek, most_bytes: usize) -> Option<Self> {
        let unwind = headers.read_unwind(file, u64::try_from(most_bytes).ok()?)?;
        let cfi = Cfi::new(&headers, &unwind, None, Machine::HERE);
        let index = cfi.needs_index().then(|| cfi.build_index());
        Some(Self { headers, unwind, index })
    }

    fn bytes(&self) -> usize {
        self.unwind.bytes().saturating_add(self.index.as_ref().map_or(0, Index::memory_estimate))
    }
}

/// What was left out for want of room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModuleLosses {
    /// Modules forgotten.
    pub forgotten: u64,
    /// Descriptors closed before their time.
    pub closed: u64,
    /// Unwind sections dropped, to be read again when needed.
    pub unloaded: u64,
    /// Files that could not be opened, or are no ELF files of this machine.
    pub unusable: u64,
    /// Modules with more unwind information than is held at all.
    pub too_large: u64,
}

/// A module that can be read.
#[derive(Clone, Debug)]
pub struct OpenModule {
    /// Path as the process had it.
    pub path: Arc<str>,
    /// Build id, lower-case hex.
    pub build_id: Option<Arc<str>>,
    /// Headers.
    pub headers: Arc<Headers>,
    /// Content.
    pub file: Arc<File>,
}

/// All modules met.
#[derive(Debug, Default)]
pub struct Modules {
    /// Cap: [`MAX_MODULES`].
    modules: HashMap<ModuleId, Module>,
    /// As many as `modules`.
    ids: HashMap<Key, ModuleId>,
    next_id: u32,
    clock: u64,
    /// Cap: [`MAX_OPEN`].
    open: usize,
    /// Cap: [`MAX_UNWIND_BYTES`].
    unwind_bytes: usize,
    /// Whether a file system is one of a process. Cap: [`MAX_FILE_SYSTEMS`].
    file_systems: HashMap<(u32, u32), bool>,
    losses: ModuleLosses,
}

impl Modules {
    /// The module.
    pub fn get(&self, id: ModuleId) -> Option<&Module> {
        self.modules.get(&id)
    }

    /// The module behind a mapping of the process, and what to subtract from an address in the mapping to get the one
    /// its file states; `None` for anonymous memory.
    pub fn meet(&mut self, process: &ProcDir, mapping: &Mapping) -> Option<(ModuleId, Option<u64>)> {
        let id = if mapping.is_vdso() {
            self.vdso(mapping)?
        } else if mapping.has_file() {
            self.file(process, mapping)
        } else {
            return None;
        };
        self.touch(id, Instant::now());
        let headers = self.modules.get(&id).and_then(|module| module.headers.as_ref());
        let page_bytes = rustix::param::page_size() as u64;
        let stated = headers.and_then(|headers| headers.stated_address_of_mapping(mapping.offset, page_bytes));
        Some((id, stated.map(|stated| mapping.start.wrapping_sub(stated))))
    }

    /// What the module says about its frames, read when it is first asked for.
    pub fn unwind_data(&mut self, id: ModuleId) -> Option<Arc<UnwindData>> {
        self.touch(id, Instant::now());
        let module = self.modules.get_mut(&id)?;
        match &module.unwind {
            UnwindState::Read(data) => return Some(data.clone()),
            UnwindState::Nothing => return None,
            UnwindState::Unread => {}
        }
        // Not without a file: it may be opened again.
        let (headers, file) = (module.headers.clone()?, module.file.clone()?);
        if headers.unwind_bytes() > MAX_UNWIND_BYTES as u64 {
            self.losses.too_large = self.losses.too_large.saturating_add(1);
        }
        let data = UnwindData::read(headers, &*file, MAX_UNWIND_BYTES).filter(|data| data.bytes() <= MAX_UNWIND_BYTES);
        let Some(data) = data.map(Arc::new) else {
            module.unwind = UnwindState::Nothing;
            return None;
        };
        module.unwind = UnwindState::Read(data.clone());
        self.unwind_bytes = self.unwind_bytes.saturating_add(data.bytes());
        while self.unwind_bytes > MAX_UNWIND_BYTES && self.unload_oldest(id) {}
        Some(data)
    }

    /// All that can be read now.
    pub fn open_modules(&self) -> Vec<OpenModule> {
        let open = |module: &Module| {
            Some(OpenModule {
                path: module.path.clone(),
                build_id: module.build_id.clone(),
                headers: module.headers.clone()?,
                file: module.file.clone()?,
            })
        };
        self.modules.values().filter_map(open).collect()
    }

    /// Closes what nobody needed for ten minutes.
    pub fn close_idle(&mut self, now: Instant) {
        for module in self.modules.values_mut() {
            if module.key != Key::Vdso
                && now.saturating_duration_since(module.met) > IDLE
                && module.file.take().is_some()
            {
                self.open = self.open.saturating_sub(1);
            }
        }
    }

    /// Heap bytes, about.
    pub fn memory_estimate(&self) -> usize {
        let segments = |headers: &Arc<Headers>| headers.segments.capacity().saturating_mul(size_of::<Segment>());
        let headers = |module: &Module| module.headers.as_ref().map_or(0, segments);
        let one = |module: &Module| {
            size_of::<(ModuleId, Module)>()
                .saturating_add(size_of::<(Key, ModuleId)>() + size_of::<Headers>())
                .saturating_add(module.path.len())
                .saturating_add(headers(module))
        };
        self.modules.values().map(one).fold(self.unwind_bytes, usize::saturating_add)
    }

    /// What was left out for want of room, since the start.
    pub fn losses(&self) -> ModuleLosses {
        self.losses
    }

    fn file(&mut self, process: &ProcDir, mapping: &Mapping) -> ModuleId {
        let path = &mapping.path;
        if self.may_hang(process, mapping.device) {
            return self.intern(Key::Unopened(mapping.device, mapping.inode, path.clone()), path.clone(), None);
        }
        if let Some(stamp) = process.stat_mapped(mapping.start, mapping.end) {
            let key = Key::File(stamp, path.clone());
            // Held, and not written to since: the same.
            if let Some(id) = self.ids.get(&key)
                && self.modules.get(id).is_some_and(|module| module.file.is_some() || module.headers.is_none())
            {
                return *id;
            }
        }
        let file = process.open_mapped(mapping.start, mapping.end).or_else(|| {
            // Without the privilege to follow map_files: the same path, if it is still the same inode.
            process.open_in_root(path).filter(|file| FileStamp::of(file).is_some_and(|s| s.inode == mapping.inode))
        });
        let key = match file.as_ref().and_then(FileStamp::of) {
            Some(stamp) => Key::File(stamp, path.clone()),
            None => Key::Unopened(mapping.device, mapping.inode, path.clone()),
        };
        self.intern(key, path.clone(), file)
    }

    /// Is nobody to ask this file system anything? Only numbers that no disk has need a look.
    fn may_hang(&mut self, process: &ProcDir, device: (u32, u32)) -> bool {
        if device.0 != 0 {
            return false;
        }
        if let Some(known) = self.file_systems.get(&device) {
            return *known;
        }
        // Not in the mounts: a subvolume, memory, or what a lazy unmount left.
        let hangs = process.answers_from_process(device).unwrap_or(false);
        if self.file_systems.len() >= MAX_FILE_SYSTEMS {
            self.file_systems.clear();
        }
        self.file_systems.insert(device, hangs);
        hangs
    }

    fn vdso(&mut self, mapping: &Mapping) -> Option<ModuleId> {
        if let Some(id) = self.ids.get(&Key::Vdso) {
            return Some(*id);
        }
        let image = own_vdso().filter(|image| {
            u64::try_from(image.len()).is_ok_and(|bytes| bytes == mapping.end.saturating_sub(mapping.start))
        })?;
        Headers::read(Cursor::new(&image)).ok()?;
        let file = rustix::fs::memfd_create("vdso", rustix::fs::MemfdFlags::CLOEXEC).ok().map(File::from);
        let file = file.filter(|mut file| file.write_all(&image).is_ok());
        Some(self.intern(Key::Vdso, mapping.path.clone(), file))
    }

    /// The id of a module that is new, or known but not held.
    fn intern(&mut self, key: Key, path: Arc<str>, file: Option<File>) -> ModuleId {
        let id = match self.ids.entry(key.clone()) {
            Slot::Occupied(known) => *known.get(),
            Slot::Vacant(vacant) => {
                let read = file.as_ref().map(Headers::read);
                let written = matches!(read, Some(Err(Unusable::NotElf)));
                let headers = read.and_then(Result::ok).map(Arc::new);
                if headers.is_none() {
                    self.losses.unusable = self.losses.unusable.saturating_add(1);
                }
                let id = ModuleId(self.next_id);
                self.next_id = self.next_id.wrapping_add(1);
                vacant.insert(id);
                let build_id = headers.as_ref().and_then(|headers| headers.build_id.as_deref()).map(Arc::from);
                let (unwind, used, met) = (UnwindState::Unread, self.clock, Instant::now());
                self.modules
                    .insert(id, Module { path, build_id, headers, written, file: None, key, unwind, used, met });
                id
            }
        };
        if let Some(module) = self.modules.get_mut(&id)
            && module.headers.is_some()
            && module.file.is_none()
            && let Some(file) = file
        {
            module.file = Some(Arc::new(file));
            self.open = self.open.saturating_add(1);
        }
        self.touch(id, Instant::now());
        while self.open > MAX_OPEN && self.close_oldest(id) {}
        while self.modules.len() > MAX_MODULES && self.forget_oldest(id) {}
        id
    }

    /// The module was met.
    pub fn touch(&mut self, id: ModuleId, now: Instant) {
        self.clock = self.clock.saturating_add(1);
        if let Some(module) = self.modules.get_mut(&id) {
            module.used = self.clock;
            module.met = now;
        }
    }

    fn oldest(&self, but: ModuleId, with: impl Fn(&Module) -> bool) -> Option<ModuleId> {
        let candidates = self.modules.iter().filter(|(id, module)| **id != but && with(module));
        candidates.min_by_key(|(_, module)| module.used).map(|(id, _)| *id)
    }

    fn close_oldest(&mut self, but: ModuleId) -> bool {
        let Some(id) = self.oldest(but, |module| module.file.is_some() && module.key != Key::Vdso) else {
            return false;
        };
        if let Some(module) = self.modules.get_mut(&id) {
            module.file = None;
        }
        self.open = self.open.saturating_sub(1);
        self.losses.closed = self.losses.closed.saturating_add(1);
        true
    }

    fn unload_oldest(&mut self, but: ModuleId) -> bool {
        let Some(id) = self.oldest(but, |module| matches!(module.unwind, UnwindState::Read(_))) else { return false };
        self.unload(id);
        self.losses.unloaded = self.losses.unloaded.saturating_add(1);
        true
    }

    fn unload(&mut self, id: ModuleId) {
        let Some(module) = self.modules.get_mut(&id) else { return };
        if let UnwindState::Read(data) = std::mem::replace(&mut module.unwind, UnwindState::Unread) {
            self.unwind_bytes = self.unwind_bytes.saturating_sub(data.bytes());
        }
    }

    fn forget_oldest(&mut self, but: ModuleId) -> bool {
        let Some(id) = self.oldest(but, |_| true) else { return false };
        self.unload(id);
        if let Some(module) = self.modules.remove(&id) {
            self.ids.remove(&module.key);
            self.open = self.open.saturating_sub(usize::from(module.file.is_some()));
        }
        self.losses.forgotten = self.losses.forgotten.saturating_add(1);
        true
    }
}

/// The vdso of this process: the kernel gives every 64-bit one the same.
fn own_vdso() -> Option<Vec<u8>> {
    let maps = Maps::parse(&ProcDir::of(std::process::id())?.read("maps", super::maps::MAX_BYTES)?);
    let mapping = maps.all().iter().find(|mapping| mapping.is_vdso())?;
    let bytes = mapping.end.checked_sub(mapping.start).filter(|bytes| *bytes <= MAX_VDSO_BYTES)?;
    let mut memory = File::open("/proc/self/mem").ok()?;
    memory.seek(SeekFrom::Start(mapping.start)).ok()?;
    let mut image = vec![0; usize::try_from(bytes).ok()?];
    memory.read_exact(&mut image).ok()?;
    Some(image)
}
