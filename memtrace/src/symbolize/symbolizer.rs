//! Finds names in symbol tables and debug information, with blazesym.
//!
//! Nothing is guessed: a symbol that does not reach to the address, or whose size is not known,
//! names nothing. Debug information gives source lines and inlined functions; the symbol table
//! gives full paths of functions that debug information names in short. So both are asked.
//!
//! The files are untrusted, so this runs in a process that has opened and mapped them
//! ([`SourceFile::map`]) and then has given up the ability to open any ([`super::confine`]).

use std::collections::BTreeMap;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use blazesym::symbolize::source::{Elf, Source};
use blazesym::symbolize::{self as blaze, CodeInfo, Input, Sym, Symbolized};
use memtrace_incident::{caps, shorten};
use memtrace_unwind::elf::{ElfHeaders, ElfSegment};
use memtrace_unwind::proc_dir::fd_path;

use super::debug_files::ModuleFiles;
use super::frame_names::{FunctionName, ModuleName, OffsetNames};

/// Most functions inlined into one another at one address.
const MAX_INLINED: usize = 64;
/// Bytes of all names given at once.
const MAX_ANSWER_BYTES: usize = 32 << 20;

/// A file that blazesym has opened and mapped, and of which nothing has been read.
pub struct SourceFile {
    /// The same file, to read its headers.
    file: File,
    symbolizer: blaze::Symbolizer,
    /// The path that `symbolizer` knows it by.
    path: PathBuf,
}

impl SourceFile {
    /// Opens a file once more in the way of blazesym, which wants a path. `None` if it cannot be
    /// opened or mapped.
    pub fn map(file: File) -> Option<Self> {
        let path = fd_path(&file);
        // A symbolizer for each file: its caches are dropped with it. It has no directories for
        // debug files, and could open none there: those are source files of their own.
        let builder = blaze::Symbolizer::builder().enable_auto_reload(false).set_debug_dirs(Some([""; 0]));
        let symbolizer = builder.enable_code_info(true).enable_inlined_fns(true).build();
        let source = Source::Elf(Elf { debug_syms: false, ..Elf::new(&path) });
        // To name no address it reads nothing. The mapping stays in its cache, by path.
        symbolizer.symbolize(&source, Input::VirtOffset(&[])).ok()?;
        Some(Self { file, symbolizer, path })
    }

    /// Its ELF headers; `None` if it has another build id than this.
    fn headers(&self, build_id: Option<&str>) -> Option<ElfHeaders> {
        let headers = ElfHeaders::read(&self.file).ok()?;
        (build_id.is_none() || headers.build_id.as_deref() == build_id).then_some(headers)
    }

    /// The names that it has for offsets of a module with these headers.
    fn names(&self, headers: &ElfHeaders, offsets: &[u64]) -> Vec<OffsetNames> {
        let stated: Vec<(u64, u64)> =
            offsets.iter().filter_map(|offset| Some((*offset, headers.stated_address(*offset)?))).collect();
        let addresses: Vec<u64> = stated.iter().map(|(_, address)| *address).collect();
        let resolve = |debug| catch_unwind(AssertUnwindSafe(|| self.resolve(debug, &addresses))).ok().flatten();
        // blazesym refuses a file with broken debug information as a whole; its symbols may be good.
        let nothing = || vec![Vec::new(); addresses.len()];
        let (by_debug, by_symbol) = (resolve(true).unwrap_or_else(nothing), resolve(false).unwrap_or_else(nothing));
        let both = by_debug.into_iter().zip(by_symbol).map(|(debug, symbol)| qualified(debug, symbol));
        stated.iter().map(|(offset, _)| *offset).zip(both).filter(|(_, names)| !names.is_empty()).collect()
    }

    /// The names of addresses, in their order; `None` if the file cannot be read.
    fn resolve(&self, debug_symbols: bool, addresses: &[u64]) -> Option<Vec<Vec<FunctionName>>> {
        let source = Source::Elf(Elf { debug_syms: debug_symbols, ..Elf::new(&self.path) });
        let answers = self.symbolizer.symbolize(&source, Input::VirtOffset(addresses)).ok()?;
        let names = answers.iter().map(|answer| match answer {
            Symbolized::Sym(symbol) => names_of(symbol),
            Symbolized::Unknown(_) => Vec::new(),
        });
        Some(names.collect())
    }
}

/// Finds names module by module and reports each module, also one without any name. Ends at the
/// first error of `report`.
pub fn find_each<E>(
    modules: Vec<ModuleFiles>,
    mut report: impl FnMut(&ModuleName, Vec<OffsetNames>) -> Result<(), E>,
) -> Result<(), E> {
    let mut bytes_left = MAX_ANSWER_BYTES;
    for module in modules {
        let mut names: BTreeMap<u64, Vec<FunctionName>> = BTreeMap::new();
        for (file, headers) in candidates(&module) {
            let open: Vec<u64> = module.offsets.iter().copied().filter(|offset| !names.contains_key(offset)).collect();
            if open.is_empty() {
                break;
            }
            for (offset, answer) in file.names(&headers, &open) {
                let size: usize = answer.iter().map(FunctionName::bytes).sum();
                if size <= bytes_left {
                    bytes_left = bytes_left.saturating_sub(size);
                    names.insert(offset, answer);
                }
            }
        }
        report(&module.name, names.into_iter().collect())?;
    }
    Ok(())
}

/// Files that may name a module, those with most information first, each with the headers that
/// offsets of frames refer to: the module's, or what they must have been.
fn candidates(module: &ModuleFiles) -> Vec<(&SourceFile, Arc<ElfHeaders>)> {
    let build_id = module.name.1.as_deref();
    // The caller holds the module itself, so it need not have a build id.
    let own = module.own.as_ref().and_then(|file| Some((file, Arc::new(file.headers(build_id)?))));
    let debug = module.debug.iter().filter_map(|file| {
        let headers = file.headers(Some(build_id?))?;
        let module = own.as_ref().map(|(_, own)| own.clone());
        Some((file, module.unwrap_or_else(|| Arc::new(with_module_offsets(headers)))))
    });
    let mut all: Vec<_> = debug.collect();
    all.extend(own);
    all
}

/// Whether names are no more and no longer than this module makes them.
pub fn is_plausible((_, names): &OffsetNames) -> bool {
    let fits = |text: &String| text.len() <= caps::TEXT;
    names.len() <= MAX_INLINED.saturating_add(1)
        && names.iter().all(|name| fits(&name.symbol) && name.file.as_ref().is_none_or(fits))
}

impl FunctionName {
    fn bytes(&self) -> usize {
        self.symbol.len().saturating_add(self.file.as_ref().map_or(0, String::len))
    }
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

/// A name as an incident may have it.
fn shortened(text: &str) -> String {
    shorten(text).unwrap_or_else(|| text.to_owned())
}

/// Restores the offsets that the segments have in the module's file. `objcopy --only-keep-debug`
/// keeps their addresses and sizes but not their offsets. Linkers put each segment at the first
/// offset after the one before that equals its address modulo its alignment, so the offsets follow.
fn with_module_offsets(headers: ElfHeaders) -> ElfHeaders {
    let emptied = |segment: &ElfSegment| segment.executable && segment.file_bytes < segment.memory_bytes;
    if !headers.segments.iter().any(emptied) {
        return headers;
    }
    let mut end: u64 = 0;
    let segments = headers
        .segments
        .iter()
        .map(|segment| {
            let align = segment.align.max(1);
            let past = segment.address.wrapping_sub(end).checked_rem(align).unwrap_or(0);
            let offset = end.saturating_add(past);
            end = offset.saturating_add(segment.memory_bytes);
            ElfSegment { offset, file_bytes: segment.memory_bytes, ..*segment }
        })
        .collect();
    ElfHeaders { segments, ..headers }
}
