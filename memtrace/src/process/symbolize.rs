//! Names for frames: function, source file and line of an offset in a module, and what was inlined there.
//!
//! Never on the way of a kill: the raw incident is on disk before. Nothing is guessed: a symbol that does not reach to
//! the address, or whose size is not known, names nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use blazesym::symbolize::source::{Elf, Source};
use blazesym::symbolize::{self as blaze, CodeInfo, Input, Sym, Symbolized, evict};
use serde::{Deserialize, Serialize};

use super::debug_files::{self, Candidate};
use super::modules::OpenModule;
use super::proc_dir::fd_path;
use memtrace_incident::{Frame, Incident};

/// Bytes of a name that are kept; a longer one is shortened in its middle.
pub const MAX_NAME_BYTES: usize = 4096;
/// Different addresses that are named at once.
pub const MAX_OFFSETS: usize = 65_536;
/// Functions inlined into one another at one address.
const MAX_INLINED: usize = 64;
/// Frames of a path, with those that were inlined.
const MAX_FRAMES: usize = 1024;
/// Bytes of all names given at once.
const MAX_ANSWER_BYTES: usize = 32 << 20;

/// A module as frames name it: path and build id.
pub type ModuleName = (String, Option<String>);

/// Which offsets of which modules have no name yet. Cap: [`MAX_OFFSETS`] offsets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Questions(pub Vec<(ModuleName, BTreeSet<u64>)>);

/// A function at an offset. Of several the innermost comes first; the last is the one that all others were inlined into.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Name {
    /// Function, demangled.
    pub symbol: String,
    /// Source file.
    pub file: Option<String>,
    /// Source line.
    pub line: Option<u32>,
}

/// The functions at an offset of a module, see [`Name`].
pub type Named = (u64, Vec<Name>);

/// What is known about them. Cap: [`MAX_OFFSETS`] offsets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answers(pub Vec<(ModuleName, Vec<Named>)>);

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Frames that had no name, and could have one.
    pub asked: usize,
    /// Of them, those that have one now.
    pub named: usize,
}

impl Questions {
    /// Those of an incident.
    pub fn of(incident: &Incident) -> Self {
        Self::of_frames(incident.allocation_paths.iter().flat_map(|path| &path.frames))
    }

    /// Those of some frames.
    pub fn of_frames<'a>(frames: impl Iterator<Item = &'a Frame>) -> Self {
        let mut questions: BTreeMap<ModuleName, BTreeSet<u64>> = BTreeMap::new();
        for (module, offset) in frames.filter_map(question).take(MAX_OFFSETS) {
            questions.entry(module).or_default().insert(offset);
        }
        Self(questions.into_iter().collect())
    }
}

impl Answers {
    /// Writes the names into an incident. Functions that were inlined become frames of their own.
    pub fn apply(&self, incident: &mut Incident) -> Summary {
        let known: BTreeMap<&ModuleName, BTreeMap<u64, &[Name]>> = self
            .0
            .iter()
            .map(|(module, names)| (module, names.iter().map(|(offset, names)| (*offset, names.as_slice())).collect()))
            .collect();
        let mut summary = Summary::default();
        for path in &mut incident.allocation_paths {
            let mut frames = Vec::with_capacity(path.frames.len());
            for frame in std::mem::take(&mut path.frames) {
                let Some((module, offset)) = question(&frame) else {
                    frames.push(frame);
                    continue;
                };
                summary.asked = summary.asked.saturating_add(1);
                let names = known.get(&module).and_then(|names| names.get(&offset).copied()).unwrap_or_default();
                summary.named = summary.named.saturating_add(usize::from(!names.is_empty()));
                match names {
                    [] => frames.push(frame),
                    names if frames.len().saturating_add(names.len()) > MAX_FRAMES => {
                        frames.extend(names.last().map(|name| named(&frame, name, false)));
                    }
                    names => {
                        let inlined = names.len().saturating_sub(1);
                        frames.extend(names.iter().enumerate().map(|(at, name)| named(&frame, name, at < inlined)));
                    }
                }
            }
            path.frames = frames;
        }
        summary
    }
}

/// Finds names. May be given to a thread of its own.
#[derive(Clone, Debug, Default)]
pub struct Symbolizer {
    modules: Vec<OpenModule>,
    debug_dirs: Vec<PathBuf>,
    /// Look for files on this machine by build id: for incidents of other machines, and of processes long gone.
    search: bool,
}

impl Symbolizer {
    /// With the content of modules that the agent holds, and with what debug packages installed on this machine. Other
    /// `debug_dirs` come first.
    pub fn with_modules(modules: Vec<OpenModule>, debug_dirs: &[PathBuf]) -> Self {
        Self { modules, debug_dirs: debug_dirs.to_vec(), search: false }
    }

    /// With files found by their build id only: in `debug_dirs` and below, and where the modules themselves were.
    pub fn with_files(debug_dirs: &[PathBuf]) -> Self {
        Self { modules: Vec::new(), debug_dirs: debug_dirs.to_vec(), search: true }
    }

    /// With these.
    pub(super) fn new(modules: Vec<OpenModule>, debug_dirs: Vec<PathBuf>, search: bool) -> Self {
        Self { modules, debug_dirs, search }
    }

    /// Names an incident, in this process: see [`super::apart`].
    pub fn incident(&self, incident: &mut Incident) -> Summary {
        self.answer(&Questions::of(incident)).apply(incident)
    }

    /// Answers questions, in this process: see [`super::apart`].
    pub fn answer(&self, questions: &Questions) -> Answers {
        let mut answers = Answers::default();
        let told: Result<(), std::convert::Infallible> = self.answer_each(questions, |module, names| {
            if !names.is_empty() {
                answers.0.push((module.clone(), names));
            }
            Ok(())
        });
        match told {
            Ok(()) => answers,
        }
    }

    /// Answers questions module by module, with an empty answer where there is none, until told to stop.
    pub fn answer_each<E>(
        &self,
        questions: &Questions,
        mut tell: impl FnMut(&ModuleName, Vec<Named>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut bytes_left = MAX_ANSWER_BYTES;
        let wanted = questions.0.iter().filter_map(|((_, build_id), _)| build_id.as_deref()).collect();
        let found = if self.search { debug_files::search(&self.debug_dirs, &wanted) } else { BTreeMap::new() };
        for (module, offsets) in &questions.0 {
            let mut names: BTreeMap<u64, Vec<Name>> = BTreeMap::new();
            for candidate in self.candidates(module, &found) {
                let open: Vec<u64> = offsets.iter().copied().filter(|offset| !names.contains_key(offset)).collect();
                if open.is_empty() {
                    break;
                }
                for (offset, answer) in ask(&candidate, &open, &self.debug_dirs) {
                    let size: usize = answer.iter().map(Name::bytes).sum();
                    if size <= bytes_left {
                        bytes_left = bytes_left.saturating_sub(size);
                        names.insert(offset, answer);
                    }
                }
            }
            tell(module, names.into_iter().collect())?;
        }
        Ok(())
    }

    /// Path and build id of each module that is held, and what opens it, in other processes too.
    pub fn held(&self) -> Vec<(ModuleName, PathBuf)> {
        let pid = std::process::id().to_string();
        let name = |module: &OpenModule| (module.path.to_string(), module.build_id.as_deref().map(str::to_owned));
        let path = |module: &OpenModule| {
            let fd = fd_path(&*module.file);
            fd.file_name().map(|fd| Path::new("/proc").join(&pid).join("fd").join(fd))
        };
        self.modules.iter().filter_map(|module| Some((name(module), path(module)?))).collect()
    }

    /// Where it looks, beside the directories of the system.
    pub fn debug_dirs(&self) -> &[PathBuf] {
        &self.debug_dirs
    }

    /// Does it look for files by their build id?
    pub fn searches(&self) -> bool {
        self.search
    }

    /// Files that may name a module, the most telling first.
    fn candidates(&self, module: &ModuleName, found: &BTreeMap<String, Vec<PathBuf>>) -> Vec<Candidate> {
        let (path, build_id) = module;
        let mut same =
            self.modules.iter().filter(|open| *open.path == **path && open.build_id.as_deref() == build_id.as_deref());
        // Two files of one path that no build id tells apart: it may be either.
        let own = match (same.next(), same.next()) {
            (Some(first), other) if other.is_none() || build_id.is_some() => Some(Candidate::of_module(first)),
            _ => None,
        };
        let headers = own.as_ref().map(|own| own.headers.clone());
        let mut candidates = Vec::new();
        if let Some(id) = build_id {
            let extra = found.get(id).into_iter().flatten().cloned();
            let first = self.modules.iter().find(|open| *open.path == **path && open.build_id.as_deref() == Some(id));
            let linked = first.map(|module| debug_files::by_link(&self.debug_dirs, module)).unwrap_or_default();
            for path in debug_files::by_build_id(&self.debug_dirs, id).chain(linked).chain(extra) {
                candidates.extend(Candidate::of_debug_file(path, id, headers.clone()));
            }
            if self.search {
                candidates.extend(Candidate::of_debug_file(PathBuf::from(path), id, None));
            }
        }
        candidates.extend(own);
        candidates
    }
}

/// Names what can be named in an incident file, with files of this machine.
pub fn symbolize_file(incident: &mut Incident, debug_dirs: &[PathBuf]) -> Summary {
    Symbolizer::with_files(debug_dirs).incident(incident)
}

impl Name {
    fn bytes(&self) -> usize {
        self.symbol.len().saturating_add(self.file.as_ref().map_or(0, String::len))
    }
}

fn question(frame: &Frame) -> Option<(ModuleName, u64)> {
    let open = frame.symbol.is_none() && !frame.kernel && !frame.inlined;
    let (module, offset) = (frame.module.as_ref()?, frame.offset?);
    open.then(|| ((module.clone(), frame.build_id.clone()), offset))
}

fn named(frame: &Frame, name: &Name, inlined: bool) -> Frame {
    Frame { symbol: Some(name.symbol.clone()), file: name.file.clone(), line: name.line, inlined, ..frame.clone() }
}

/// What a file says about offsets of its module.
fn ask(candidate: &Candidate, offsets: &[u64], debug_dirs: &[PathBuf]) -> Vec<Named> {
    let stated: Vec<(u64, u64)> =
        offsets.iter().filter_map(|offset| Some((*offset, candidate.stated_address(*offset)?))).collect();
    let addresses: Vec<u64> = stated.iter().map(|(_, address)| *address).collect();
    let path = &candidate.path;
    let resolve =
        |debug| catch_unwind(AssertUnwindSafe(|| resolve(path, debug, &addresses, debug_dirs))).ok().flatten();
    // Debug information that is broken makes blazesym refuse the file altogether; its symbols may still be good.
    let nothing = || vec![Vec::new(); addresses.len()];
    let (by_debug, by_symbol) = (resolve(true).unwrap_or_else(nothing), resolve(false).unwrap_or_else(nothing));
    let both = by_debug.into_iter().zip(by_symbol).map(|(debug, symbol)| qualified(debug, symbol));
    stated.iter().map(|(offset, _)| *offset).zip(both).filter(|(_, names)| !names.is_empty()).collect()
}

/// Debug information that has only lines, as release builds of Rust do, names functions without the path to them. The
/// symbol has it.
fn qualified(mut debug: Vec<Name>, symbol: Vec<Name>) -> Vec<Name> {
    let Some(outer) = debug.last_mut() else { return symbol };
    let base = outer.symbol.split('<').next().unwrap_or_default();
    if let Some(whole) = symbol.into_iter().next()
        && !base.contains("::")
        && whole.symbol.contains("::")
        && (whole.symbol.contains(base) || base.starts_with("{closure") && whole.symbol.contains("{closure"))
    {
        outer.symbol = whole.symbol;
    }
    debug
}

/// The names of addresses, in their order; `None` when the file cannot be read so.
fn resolve(path: &Path, debug_symbols: bool, addresses: &[u64], debug_dirs: &[PathBuf]) -> Option<Vec<Vec<Name>>> {
    let dirs = debug_dirs.iter().cloned().chain(debug_files::SYSTEM_DIRS.iter().map(PathBuf::from));
    let builder =
        blaze::Symbolizer::builder().enable_auto_reload(false).enable_code_info(true).enable_inlined_fns(true);
    // One for each file: what it caches, descriptors among it, goes with it.
    let mut symbolizer = builder.set_debug_dirs(Some(dirs)).build();
    let source = Source::Elf(Elf { debug_syms: debug_symbols, ..Elf::new(path) });
    let answers = symbolizer.symbolize(&source, Input::VirtOffset(addresses)).ok()?;
    let names = answers
        .iter()
        .map(|answer| match answer {
            Symbolized::Sym(symbol) => names_of(symbol),
            Symbolized::Unknown(_) => Vec::new(),
        })
        .collect();
    drop(answers);
    let _ = symbolizer.evict(&evict::Elf::new(path).into());
    Some(names)
}

fn names_of(symbol: &Sym<'_>) -> Vec<Name> {
    // A function in several parts has neither size nor start, but DWARF found it by its ranges. Of an ELF symbol without
    // a size it is only known that it begins somewhere below.
    let in_parts = symbol.addr == 0 && symbol.code_info.is_some();
    let reaches = symbol.size.map_or(in_parts, |size| symbol.offset < size);
    if !reaches || symbol.name.is_empty() {
        return Vec::new();
    }
    let outer = name(&symbol.name, symbol.code_info.as_deref());
    let inlined = symbol.inlined.iter().take(MAX_INLINED).map(|inner| name(&inner.name, inner.code_info.as_ref()));
    let mut names: Vec<Name> = std::iter::once(outer).chain(inlined).collect();
    names.reverse();
    names
}

fn name(symbol: &str, code: Option<&CodeInfo<'_>>) -> Name {
    Name {
        symbol: shortened(symbol),
        file: code.map(|code| shortened(&code.to_path().to_string_lossy())),
        line: code.and_then(|code| code.line),
    }
}

/// Both ends of a long text.
fn shortened(text: &str) -> String {
    if text.len() <= MAX_NAME_BYTES {
        return text.to_owned();
    }
    const HALF: usize = MAX_NAME_BYTES / 2 - 2;
    let head = text.get(..text.floor_char_boundary(HALF)).unwrap_or_default();
    let tail = text.get(text.ceil_char_boundary(text.len().saturating_sub(HALF))..).unwrap_or_default();
    format!("{head}…{tail}")
}
