//! Modules: the files that code was mapped from, each opened once for all processes.
//!
//! A file is opened when a frame lies in it, and only if its process may read it; of one that is open
//! for another process the mode is looked at again.
//!
//! A file is known by device, inode, size and modification time ([`FileStamp`]), so a library that
//! a thousand processes map is read once, and one that was written to is a new module. While its
//! descriptor is held, the content stays readable even if the file is deleted and its container is
//! gone: functions can be named after their process has died. But it also keeps a file system from
//! being unmounted, so it is closed soon after the last process that maps the file has ended. A
//! [`ModuleId`] is never reused.

use std::collections::{HashMap, HashSet, hash_map::Entry as Slot};
use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cfi::{Cfi, EntryIndex, RegisterColumns};
use crate::elf::{ElfError, ElfHeaders, ElfSegment, UnwindSections};
use crate::gate::{Gate, Place};
use crate::maps::{Mapping, Maps};
use crate::proc_dir::{Credentials, FileAccess, FileStamp, ProcDir};
use crate::unwind::MappedModule;

mod room;
#[cfg(test)]
pub(crate) mod tests;

/// Most modules known; beyond it those go that `room` finds.
pub const MAX_MODULES: usize = 4096;
/// Most descriptors held; beyond it those are closed that `room` finds.
pub const MAX_OPEN: usize = 512;
/// Bytes of unwind sections held for all modules, see `room`; a module that alone has more is not
/// unwound.
pub const MAX_UNWIND_BYTES: usize = 16 << 20;
/// File systems whose kind is cached.
const MAX_FILE_SYSTEMS: usize = 1024;
/// An unused descriptor is closed after this time: it keeps the disk space of a deleted file, and
/// the mount of a container image.
const IDLE: Duration = Duration::from_mins(10);
/// Largest vdso that is read; it has two to four pages.
const MAX_VDSO_BYTES: u64 = 64 << 10;

/// Identifies a module for as long as this process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModuleId(pub u32);

/// A file that code was mapped from.
#[derive(Debug)]
pub struct Module {
    /// Path as the process had it, or `[vdso]`.
    pub path: Arc<str>,
    /// Build id, lower-case hex.
    pub build_id: Option<Arc<str>>,
    /// `None`: the file could not be opened, or is not an ELF file for this architecture.
    headers: Option<Arc<ElfHeaders>>,
    /// It was opened and is not an ELF file: code in it was written at run time.
    generated: bool,
    /// The content, while the descriptor is held. Cap of all: [`MAX_OPEN`].
    file: Option<Arc<File>>,
    key: ModuleKey,
    /// Where it is read.
    place: Place,
    unwind: UnwindState,
    /// The user on whose account it was made known, or read, last; `None`: not known.
    owner: Option<u32>,
    /// Order of use, for eviction.
    used: u64,
    met: Instant,
    /// Since when no process that is followed maps it.
    unmapped: Option<Instant>,
}

impl Module {
    /// Whether it is not an ELF file, so that code in it was written at run time.
    pub fn is_generated(&self) -> bool {
        self.generated
    }

    /// Whether it could be read once, but its descriptor was closed.
    pub fn is_closed(&self) -> bool {
        self.headers.is_some() && self.file.is_none()
    }

    /// ELF headers, if it could be read.
    pub fn headers(&self) -> Option<&Arc<ElfHeaders>> {
        self.headers.as_ref()
    }

    /// Its content, while the descriptor is held.
    pub fn file(&self) -> Option<&Arc<File>> {
        self.file.as_ref()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum ModuleKey {
    File(FileStamp, Arc<str>),
    /// Could not be opened: device and inode from /proc/PID/maps.
    Unopened((u32, u32), u64, Arc<str>),
    Vdso,
}

#[derive(Debug)]
enum UnwindState {
    Unread,
    /// The module has none, or too much.
    Unavailable,
    Read(Arc<UnwindData>),
}

/// Unwind information of a module; all processes that map it share it.
#[derive(Debug)]
pub struct UnwindData {
    /// Headers of the module.
    pub headers: Arc<ElfHeaders>,
    unwind: UnwindSections,
    index: Option<EntryIndex>,
}

impl UnwindData {
    /// Looks up rules in it.
    pub fn cfi(&self) -> Cfi<'_> {
        Cfi::new(&self.headers, &self.unwind, self.index.as_ref(), RegisterColumns::NATIVE)
    }

    /// Reads and indexes the unwind sections of a file; `None` if it has none, or more than
    /// `most_bytes`.
    pub fn read(headers: Arc<ElfHeaders>, file: impl Read + Seek, most_bytes: usize) -> Option<Self> {
        let unwind = headers.read_unwind(file, u64::try_from(most_bytes).ok()?)?;
        let cfi = Cfi::new(&headers, &unwind, None, RegisterColumns::NATIVE);
        let index = cfi.needs_index().then(|| cfi.build_index());
        Some(Self { headers, unwind, index })
    }

    fn bytes(&self) -> usize {
        self.unwind.bytes().saturating_add(self.index.as_ref().map_or(0, EntryIndex::memory_estimate))
    }
}

/// What was left out or given up for want of room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModuleLosses {
    /// Modules forgotten.
    pub forgotten: u64,
    /// Descriptors closed for want of room, not because they were idle.
    pub closed: u64,
    /// Times unwind sections were dropped; they are read again when needed.
    pub unloaded: u64,
    /// Files that could not be opened, or are not ELF files for this architecture.
    pub unusable: u64,
    /// Modules with more than [`MAX_UNWIND_BYTES`] of unwind sections.
    pub too_large: u64,
}

/// A module whose content can be read.
#[derive(Clone, Debug)]
pub struct OpenModule {
    /// Path as the process had it.
    pub path: Arc<str>,
    /// Build id, lower-case hex.
    pub build_id: Option<Arc<str>>,
    /// Name of its debug file, see [`ElfHeaders::debug_link`].
    pub debug_link: Option<String>,
    /// The open file.
    pub file: Arc<File>,
}

/// A process whose files are to be opened.
#[derive(Clone, Debug)]
pub struct Reader {
    /// Its directory in /proc.
    pub dir: Arc<ProcDir>,
    /// Who it is.
    pub credentials: Arc<Credentials>,
}

/// A file that was opened, and what it is.
type Loaded = (FileStamp, File, Result<ElfHeaders, ElfError>);

impl Reader {
    /// Reads the headers of a file, unless the process may not.
    fn load(&self, file: File) -> Option<Loaded> {
        FileAccess::of(&file).filter(|access| self.credentials.may_read(*access))?;
        let (stamp, headers) = (FileStamp::of(&file)?, ElfHeaders::read(&file));
        Some((stamp, file, headers))
    }
}

/// All modules known.
#[derive(Debug, Default)]
pub struct Modules {
    /// Cap: [`MAX_MODULES`].
    modules: HashMap<ModuleId, Module>,
    /// The inverse of `modules`, and as large.
    ids: HashMap<ModuleKey, ModuleId>,
    next_id: u32,
    clock: u64,
    /// Cap: [`MAX_OPEN`].
    open: usize,
    /// Cap: [`MAX_UNWIND_BYTES`].
    unwind_bytes: usize,
    /// Whether a file system is FUSE, by device number. Cap: [`MAX_FILE_SYSTEMS`].
    file_systems: HashMap<(u32, u32), bool>,
    losses: ModuleLosses,
    /// Every reading of a file goes through it.
    pub(crate) gate: Gate,
}

impl Modules {
    /// The module with this id; `None` if it was forgotten.
    pub fn get(&self, id: ModuleId) -> Option<&Module> {
        self.modules.get(&id)
    }

    /// Modules whose files are read through `gate`.
    pub fn new(gate: Gate) -> Self {
        Self { gate, ..Self::default() }
    }

    /// The module of a mapping, opened if it is new and the gate lets it pass.
    pub fn lookup_or_insert(&mut self, reader: &Reader, mapping: &Mapping) -> MappedModule {
        let id = if mapping.is_vdso() {
            self.vdso(mapping)
        } else if mapping.has_file() {
            let Some(id) = self.file(reader, mapping) else { return self.unread(mapping) };
            Some(id)
        } else {
            None
        };
        let Some(id) = id else { return MappedModule::Anonymous };
        self.mark_used(id, Instant::now());
        let headers = self.modules.get(&id).and_then(|module| module.headers.as_ref());
        let page_bytes = rustix::param::page_size() as u64;
        let stated = headers.and_then(|headers| headers.stated_address_of_mapping(mapping.offset, page_bytes));
        MappedModule::Read(id, stated.map(|stated| mapping.start.wrapping_sub(stated)))
    }

    /// The module of a mapping by its path alone; no file is touched.
    pub fn unread(&mut self, mapping: &Mapping) -> MappedModule {
        if !mapping.has_file() {
            return MappedModule::Anonymous;
        }
        MappedModule::Unread(self.intern(unopened(mapping), mapping, None))
    }

    /// The unwind information of a module, read at the first call.
    pub fn unwind_data(&mut self, id: ModuleId) -> Option<Arc<UnwindData>> {
        self.mark_used(id, Instant::now());
        let module = self.modules.get_mut(&id)?;
        match &module.unwind {
            UnwindState::Read(data) => return Some(data.clone()),
            UnwindState::Unavailable => return None,
            UnwindState::Unread => {}
        }
        // Without a file, try again later: it may be opened again.
        let (headers, file) = (module.headers.clone()?, module.file.clone()?);
        if headers.unwind_bytes() > MAX_UNWIND_BYTES as u64 {
            self.losses.too_large = self.losses.too_large.saturating_add(1);
        }
        let read = move || UnwindData::read(headers, &*file, MAX_UNWIND_BYTES);
        let data = self.gate.pass(module.place, read)?.filter(|data| data.bytes() <= MAX_UNWIND_BYTES);
        let Some(data) = data.map(Arc::new) else {
            module.unwind = UnwindState::Unavailable;
            return None;
        };
        module.unwind = UnwindState::Read(data.clone());
        module.owner = self.gate.user();
        self.unwind_bytes = self.unwind_bytes.saturating_add(data.bytes());
        self.make_room_for_unwind_data();
        Some(data)
    }

    /// All modules whose descriptor is held.
    pub fn open_modules(&self) -> Vec<OpenModule> {
        let open = |module: &Module| {
            Some(OpenModule {
                path: module.path.clone(),
                build_id: module.build_id.clone(),
                debug_link: module.headers.as_ref()?.debug_link.clone(),
                file: module.file.clone()?,
            })
        };
        self.modules.values().filter_map(open).collect()
    }

    /// Closes descriptors that were not used for ten minutes, and those of files that are not among
    /// the `mapped` ones for `keep` by now.
    pub fn close_unused(&mut self, mapped: &HashSet<ModuleId>, keep: Duration, now: Instant) {
        for (id, module) in self.modules.iter_mut().filter(|(_, module)| module.key != ModuleKey::Vdso) {
            if mapped.contains(id) {
                module.unmapped = None;
            }
            let unmapped = *module.unmapped.get_or_insert(now);
            let over = !mapped.contains(id) && now.saturating_duration_since(unmapped) >= keep;
            let idle = now.saturating_duration_since(module.met) > IDLE;
            if (over || idle) && module.file.take().is_some() {
                self.open = self.open.saturating_sub(1);
            }
        }
    }

    /// Whether any descriptor is held.
    pub fn holds_files(&self) -> bool {
        self.open > 0
    }

    /// Approximate heap size in bytes.
    pub fn memory_estimate(&self) -> usize {
        let segments = |headers: &Arc<ElfHeaders>| headers.segments.capacity().saturating_mul(size_of::<ElfSegment>());
        let headers = |module: &Module| module.headers.as_ref().map_or(0, segments);
        let one = |module: &Module| {
            size_of::<(ModuleId, Module)>()
                .saturating_add(size_of::<(ModuleKey, ModuleId)>() + size_of::<ElfHeaders>())
                .saturating_add(module.path.len())
                .saturating_add(headers(module))
        };
        self.modules.values().map(one).fold(self.unwind_bytes, usize::saturating_add)
    }

    /// What was left out or given up, since the start.
    pub fn losses(&self) -> ModuleLosses {
        self.losses
    }

    /// `None`: the gate did not let it pass.
    fn file(&mut self, reader: &Reader, mapping: &Mapping) -> Option<ModuleId> {
        let path = &mapping.path;
        if self.is_fuse(mapping.device) {
            return Some(self.intern(unopened(mapping), mapping, None));
        }
        let place = Place::Device(mapping.device);
        let (dir, start, end) = (reader.dir.clone(), mapping.start, mapping.end);
        let stat = move || dir.stat_mapped(start, end);
        if let Some((stamp, access)) = self.gate.pass(place, stat)? {
            if !reader.credentials.may_read(access) {
                return Some(self.intern(unopened(mapping), mapping, None));
            }
            let key = ModuleKey::File(stamp, path.clone());
            // Held, and not written to since.
            let is_held =
                |id: &&ModuleId| self.modules.get(id).is_some_and(|m| m.file.is_some() || m.headers.is_none());
            if let Some(id) = self.ids.get(&key).filter(is_held) {
                return Some(*id);
            }
        }
        let of = reader.clone();
        let mut opened = self.gate.pass(place, move || of.load(of.dir.open_mapped(start, end)?))?;
        if opened.is_none() {
            // map_files needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE. Without it: the same path, if it
            // still leads to the same inode.
            let (of, path, inode) = (reader.clone(), path.clone(), mapping.inode);
            let open = move || of.load(of.dir.open_in_root(&path)?).filter(|(stamp, ..)| stamp.inode == inode);
            opened = self.gate.pass(Place::Path, open).flatten();
        }
        Some(match opened {
            Some((stamp, file, headers)) => {
                self.intern(ModuleKey::File(stamp, mapping.path.clone()), mapping, Some((headers, file)))
            }
            None => self.intern(unopened(mapping), mapping, None),
        })
    }

    /// Takes note of the file systems that a process has mounted.
    pub fn learn_file_systems(&mut self, found: Vec<((u32, u32), bool)>) {
        // A number is used again once its file system is unmounted: the newest answer counts.
        self.file_systems.clear();
        self.file_systems.extend(found.into_iter().take(MAX_FILE_SYSTEMS));
    }

    /// Whether the file system of this mapping is not known, and may be FUSE. Disks have a major
    /// number other than 0.
    pub fn is_unknown_file_system(&self, mapping: &Mapping) -> bool {
        mapping.has_file() && mapping.device.0 == 0 && !self.file_systems.contains_key(&mapping.device)
    }

    /// Whether this is FUSE, which may never answer. What this does not find (FUSE below another file
    /// system, or lazily unmounted) hangs, and whoever waits for this process replaces it.
    fn is_fuse(&self, device: (u32, u32)) -> bool {
        self.file_systems.get(&device).copied().unwrap_or(false)
    }

    fn vdso(&mut self, mapping: &Mapping) -> Option<ModuleId> {
        if let Some(id) = self.ids.get(&ModuleKey::Vdso) {
            return Some(*id);
        }
        let image = own_vdso().filter(|image| {
            u64::try_from(image.len()).is_ok_and(|bytes| bytes == mapping.end.saturating_sub(mapping.start))
        })?;
        ElfHeaders::read(Cursor::new(&image)).ok()?;
        let file = rustix::fs::memfd_create("vdso", rustix::fs::MemfdFlags::CLOEXEC).ok().map(File::from);
        let file = file.filter(|mut file| file.write_all(&image).is_ok());
        let file = file.map(|file| (ElfHeaders::read(&file), file));
        Some(self.intern(ModuleKey::Vdso, mapping, file))
    }

    /// The id of a module that is new, or known without a descriptor.
    fn intern(
        &mut self,
        key: ModuleKey,
        mapping: &Mapping,
        opened: Option<(Result<ElfHeaders, ElfError>, File)>,
    ) -> ModuleId {
        let (read, file) = opened.unzip();
        let id = match self.ids.entry(key.clone()) {
            Slot::Occupied(known) => *known.get(),
            Slot::Vacant(vacant) => {
                let generated = matches!(read, Some(Err(ElfError::NotElf)));
                let headers = read.and_then(Result::ok).map(Arc::new);
                if headers.is_none() {
                    self.losses.unusable = self.losses.unusable.saturating_add(1);
                }
                let id = ModuleId(self.next_id);
                self.next_id = self.next_id.wrapping_add(1);
                vacant.insert(id);
                let build_id = headers.as_ref().and_then(|headers| headers.build_id.as_deref()).map(Arc::from);
                let (unwind, used, met) = (UnwindState::Unread, self.clock, Instant::now());
                let owner = self.gate.user();
                let place = if key == ModuleKey::Vdso { Place::Proc } else { Place::Device(mapping.device) };
                let (path, file) = (mapping.path.clone(), None);
                let unmapped = None;
                let module =
                    Module { path, build_id, headers, generated, file, key, place, unwind, owner, used, met, unmapped };
                self.modules.insert(id, module);
                id
            }
        };
        let user = self.gate.user();
        if let Some(module) = self.modules.get_mut(&id)
            && module.headers.is_some()
            && module.file.is_none()
            && let Some(file) = file
        {
            module.file = Some(Arc::new(file));
            module.owner = user;
            self.open = self.open.saturating_add(1);
        }
        self.mark_used(id, Instant::now());
        self.make_room_for_files(id);
        self.make_room_for_modules(id);
        id
    }

    /// The module is in use: it is the last to be evicted.
    pub fn mark_used(&mut self, id: ModuleId, now: Instant) {
        self.clock = self.clock.saturating_add(1);
        if let Some(module) = self.modules.get_mut(&id) {
            module.used = self.clock;
            module.met = now;
        }
    }
}

fn unopened(mapping: &Mapping) -> ModuleKey {
    ModuleKey::Unopened(mapping.device, mapping.inode, mapping.path.clone())
}

/// The vdso image of this process, which every 64-bit process of this kernel has too.
fn own_vdso() -> Option<Vec<u8>> {
    let maps = Maps::parse(&ProcDir::of(std::process::id())?.read("maps", crate::maps::MAX_BYTES)?);
    let mapping = maps.all().iter().find(|mapping| mapping.is_vdso())?;
    let bytes = mapping.end.checked_sub(mapping.start).filter(|bytes| *bytes <= MAX_VDSO_BYTES)?;
    let mut memory = File::open("/proc/self/mem").ok()?;
    memory.seek(SeekFrom::Start(mapping.start)).ok()?;
    let mut image = vec![0; usize::try_from(bytes).ok()?];
    memory.read_exact(&mut image).ok()?;
    Some(image)
}
