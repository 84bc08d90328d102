//! Finds names in symbol tables and debug information, with blazesym.
//!
//! Nothing is guessed: a symbol that does not reach to the address, or whose size is not known,
//! names nothing. Debug information gives source lines and inlined functions; the symbol table
//! gives full paths of functions that debug information names in short. So both are asked.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use blazesym::symbolize::source::{Elf, Source};
use blazesym::symbolize::{self as blaze, CodeInfo, Input, Sym, Symbolized, evict};
use memtrace_incident::Incident;
use memtrace_unwind::modules::OpenModule;
use memtrace_unwind::proc_dir::fd_path;

use super::debug_files::{self, DebugCandidate};
use super::frame_names::{FrameNames, FunctionName, ModuleName, NamingSummary, OffsetNames, UnnamedFrames};

/// Bytes kept of a name; a longer one is shortened in its middle.
pub const MAX_NAME_BYTES: usize = 4096;
/// Most functions inlined into one another at one address.
const MAX_INLINED: usize = 64;
/// Bytes of all names given at once.
const MAX_ANSWER_BYTES: usize = 32 << 20;

/// Finds names in the files of modules.
#[derive(Clone, Debug, Default)]
pub struct Symbolizer {
    /// Cap: that of the cache they come from, [`memtrace_unwind::modules::MAX_OPEN`].
    modules: Vec<OpenModule>,
    debug_dirs: Vec<PathBuf>,
    /// Look for files by build id: for incidents of other machines, and of processes long gone.
    search: bool,
}

impl Symbolizer {
    /// Names from the modules that the agent holds open, and from debug files that are installed on
    /// this machine. `debug_dirs` are searched first.
    pub fn with_modules(modules: Vec<OpenModule>, debug_dirs: &[PathBuf]) -> Self {
        Self { modules, debug_dirs: debug_dirs.to_vec(), search: false }
    }

    /// Names from files found by their build id only: in and below `debug_dirs`, and at the paths
    /// of the modules.
    pub fn with_files(debug_dirs: &[PathBuf]) -> Self {
        Self { modules: Vec::new(), debug_dirs: debug_dirs.to_vec(), search: true }
    }

    pub(super) fn new(modules: Vec<OpenModule>, debug_dirs: Vec<PathBuf>, search: bool) -> Self {
        Self { modules, debug_dirs, search }
    }

    /// Names the frames of an incident, in this process: see [`super::subprocess`].
    pub fn name(&self, incident: &mut Incident) -> NamingSummary {
        self.find(&UnnamedFrames::of(incident)).apply(incident)
    }

    /// Finds names in this process: see [`super::subprocess`].
    pub fn find(&self, unnamed: &UnnamedFrames) -> FrameNames {
        let mut found = FrameNames::default();
        let reported: Result<(), std::convert::Infallible> = self.find_each(unnamed, |module, names| {
            if !names.is_empty() {
                found.0.push((module.clone(), names));
            }
            Ok(())
        });
        match reported {
            Ok(()) => found,
        }
    }

    /// Finds names module by module and reports each module, also one without any name. Ends at the
    /// first error of `report`.
    pub fn find_each<E>(
        &self,
        unnamed: &UnnamedFrames,
        mut report: impl FnMut(&ModuleName, Vec<OffsetNames>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut bytes_left = MAX_ANSWER_BYTES;
        let wanted = unnamed.0.iter().filter_map(|((_, build_id), _)| build_id.as_deref()).collect();
        let found = if self.search { debug_files::search(&self.debug_dirs, &wanted) } else { BTreeMap::new() };
        for (module, offsets) in &unnamed.0 {
            let mut names: BTreeMap<u64, Vec<FunctionName>> = BTreeMap::new();
            for candidate in self.candidates(module, &found) {
                let open: Vec<u64> = offsets.iter().copied().filter(|offset| !names.contains_key(offset)).collect();
                if open.is_empty() {
                    break;
                }
                for (offset, answer) in names_in(&candidate, &open, &self.debug_dirs) {
                    let size: usize = answer.iter().map(FunctionName::bytes).sum();
                    if size <= bytes_left {
                        bytes_left = bytes_left.saturating_sub(size);
                        names.insert(offset, answer);
                    }
                }
            }
            report(module, names.into_iter().collect())?;
        }
        Ok(())
    }

    /// The modules that are held open, each with a path under which other processes can open it.
    pub fn open_paths(&self) -> Vec<(ModuleName, PathBuf)> {
        let pid = std::process::id().to_string();
        let name = |module: &OpenModule| (module.path.to_string(), module.build_id.as_deref().map(str::to_owned));
        let path = |module: &OpenModule| {
            let fd = fd_path(&*module.file);
            fd.file_name().map(|fd| Path::new("/proc").join(&pid).join("fd").join(fd))
        };
        self.modules.iter().filter_map(|module| Some((name(module), path(module)?))).collect()
    }

    /// Directories that are searched before those of the system.
    pub fn debug_dirs(&self) -> &[PathBuf] {
        &self.debug_dirs
    }

    /// Whether files are looked for by build id.
    pub fn searches(&self) -> bool {
        self.search
    }

    /// Files that may name a module, those with most information first.
    fn candidates(&self, module: &ModuleName, found: &BTreeMap<String, Vec<PathBuf>>) -> Vec<DebugCandidate> {
        let (path, build_id) = module;
        let mut same =
            self.modules.iter().filter(|open| *open.path == **path && open.build_id.as_deref() == build_id.as_deref());
        // Two files of one path and no build id: it may be either, so it is neither.
        let own = match (same.next(), same.next()) {
            (Some(first), other) if other.is_none() || build_id.is_some() => Some(DebugCandidate::of_module(first)),
            _ => None,
        };
        let headers = own.as_ref().map(|own| own.headers.clone());
        let mut candidates = Vec::new();
        if let Some(id) = build_id {
            let extra = found.get(id).into_iter().flatten().cloned();
            let first = self.modules.iter().find(|open| *open.path == **path && open.build_id.as_deref() == Some(id));
            let linked = first.map(|module| debug_files::by_link(&self.debug_dirs, module)).unwrap_or_default();
            for path in debug_files::by_build_id(&self.debug_dirs, id).chain(linked).chain(extra) {
                candidates.extend(DebugCandidate::of_debug_file(path, id, headers.clone()));
            }
            if self.search {
                candidates.extend(DebugCandidate::of_debug_file(PathBuf::from(path), id, None));
            }
        }
        candidates.extend(own);
        candidates
    }
}

/// Names what can be named in an incident, with files of this machine.
pub fn symbolize_file(incident: &mut Incident, debug_dirs: &[PathBuf]) -> NamingSummary {
    Symbolizer::with_files(debug_dirs).name(incident)
}

impl FunctionName {
    fn bytes(&self) -> usize {
        self.symbol.len().saturating_add(self.file.as_ref().map_or(0, String::len))
    }
}

/// The names that one file has for offsets of its module.
fn names_in(candidate: &DebugCandidate, offsets: &[u64], debug_dirs: &[PathBuf]) -> Vec<OffsetNames> {
    let stated: Vec<(u64, u64)> =
        offsets.iter().filter_map(|offset| Some((*offset, candidate.stated_address(*offset)?))).collect();
    let addresses: Vec<u64> = stated.iter().map(|(_, address)| *address).collect();
    let path = &candidate.path;
    let resolve =
        |debug| catch_unwind(AssertUnwindSafe(|| resolve(path, debug, &addresses, debug_dirs))).ok().flatten();
    // blazesym refuses a file with broken debug information as a whole; its symbols may be good.
    let nothing = || vec![Vec::new(); addresses.len()];
    let (by_debug, by_symbol) = (resolve(true).unwrap_or_else(nothing), resolve(false).unwrap_or_else(nothing));
    let both = by_debug.into_iter().zip(by_symbol).map(|(debug, symbol)| qualified(debug, symbol));
    stated.iter().map(|(offset, _)| *offset).zip(both).filter(|(_, names)| !names.is_empty()).collect()
}

/// Debug information with line tables only, as in release builds of Rust, names functions without
/// their path; the symbol table has it.
fn qualified(mut debug: Vec<FunctionName>, symbol: Vec<FunctionName>) -> Vec<FunctionName> {
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

/// The names of addresses, in their order; `None` if the file cannot be read.
fn resolve(
    path: &Path,
    debug_symbols: bool,
    addresses: &[u64],
    debug_dirs: &[PathBuf],
) -> Option<Vec<Vec<FunctionName>>> {
    let dirs = debug_dirs.iter().cloned().chain(debug_files::SYSTEM_DIRS.iter().map(PathBuf::from));
    let builder =
        blaze::Symbolizer::builder().enable_auto_reload(false).enable_code_info(true).enable_inlined_fns(true);
    // A symbolizer for each file: its caches, which hold descriptors, are dropped with it.
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

fn names_of(symbol: &Sym<'_>) -> Vec<FunctionName> {
    // A function in several parts has neither size nor start, but DWARF found it by its ranges. An
    // ELF symbol without a size only begins somewhere below the address.
    let in_parts = symbol.addr == 0 && symbol.code_info.is_some();
    let reaches = symbol.size.map_or(in_parts, |size| symbol.offset < size);
    if !reaches || symbol.name.is_empty() {
        return Vec::new();
    }
    let outer = name(&symbol.name, symbol.code_info.as_deref());
    let inlined = symbol.inlined.iter().take(MAX_INLINED).map(|inner| name(&inner.name, inner.code_info.as_ref()));
    let mut names: Vec<FunctionName> = std::iter::once(outer).chain(inlined).collect();
    names.reverse();
    names
}

fn name(symbol: &str, code: Option<&CodeInfo<'_>>) -> FunctionName {
    FunctionName {
        symbol: shortened(symbol),
        file: code.map(|code| shortened(&code.to_path().to_string_lossy())),
        line: code.and_then(|code| code.line),
    }
}

/// Beginning and end of a text that is too long.
fn shortened(text: &str) -> String {
    if text.len() <= MAX_NAME_BYTES {
        return text.to_owned();
    }
    const HALF: usize = MAX_NAME_BYTES / 2 - 2;
    let head = text.get(..text.floor_char_boundary(HALF)).unwrap_or_default();
    let tail = text.get(text.ceil_char_boundary(text.len().saturating_sub(HALF))..).unwrap_or_default();
    format!("{head}…{tail}")
}
