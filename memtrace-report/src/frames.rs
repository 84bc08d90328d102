//! Frames as people read them: a label, whose code it is, and a short name.
//!
//! A report blames the innermost function of the program itself, so it has to tell the program from
//! its allocator, its libc and its standard library. Names and source files decide that, because
//! all of these may be linked into one executable. Example: with `malloc` (runtime),
//! `ringlog::grow` (dependency) and `app::load` (program) on a stack, `app::load` is blamed.

use memtrace_incident::Frame;

/// Whose code a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CodeOwner {
    /// The program itself.
    Program,
    /// A crate from a registry or from git.
    Dependency,
    /// Standard library, allocator, libc or dynamic linker: never blamed.
    Runtime,
    /// A kernel function.
    Kernel,
    /// The frame has neither module nor name.
    Unknown,
}

/// Prefixes of file names of shared objects whose code is [`CodeOwner::Runtime`].
const RUNTIME_MODULES: [&str; 24] = [
    "libc.so",
    "libc-2.",
    "libc.musl-",
    "ld-linux",
    "ld-musl-",
    "ld-2.",
    "ld.so",
    "ld64.so",
    "libstdc++",
    "libc++",
    "libgcc_s",
    "libpthread",
    "libm.so",
    "libm-2.",
    "libmvec",
    "libdl.so",
    "libdl-2.",
    "librt.so",
    "libjemalloc",
    "libmimalloc",
    "libtcmalloc",
    "libasan",
    "libunwind",
    "[vdso]",
];

/// Source files with one of these in their path are [`CodeOwner::Runtime`].
const RUNTIME_FILES: [&str; 14] = [
    "/rustc/",
    "/library/std/src/",
    "/library/core/src/",
    "/library/alloc/src/",
    "/hashbrown-",
    "/hashbrown/src/",
    "/include/c++/",
    "/libstdc++-v3/",
    "/sysdeps/",
    "/Objects/obmalloc.c",
    "/tikv-jemalloc-sys-",
    "/jemalloc/src/",
    "/libmimalloc-sys-",
    "/mimalloc/src/",
];

/// Prefixes of glibc's source files: distributions compile it with paths relative to each part.
const LIBC_FILES: [&str; 10] = [
    "./csu/",
    "./elf/",
    "./malloc/",
    "./misc/",
    "./nptl/",
    "./string/",
    "./stdlib/",
    "./libio/",
    "./io/",
    "../sysdeps/",
];

/// Prefixes of symbols that are [`CodeOwner::Runtime`] in any file.
const RUNTIME_PREFIXES: [&str; 28] = [
    "std::",
    "core::",
    "alloc::",
    "hashbrown::",
    "__rust_",
    "__rdl_",
    "__rustc",
    "_rust_",
    "__gnu_cxx::",
    "__cxxabiv1::",
    "operator new",
    "operator delete",
    "_Znw",
    "_Zna",
    "_ZSt",
    "_ZNSt",
    "__libc_",
    "__GI_",
    "je_",
    "_rjem_",
    "_rje_",
    "mi_",
    "_mi_",
    "tc_",
    "tcmalloc::",
    "(anonymous namespace)::do_malloc",
    "_PyMem_",
    "PyMem_",
];

/// Symbols that are [`CodeOwner::Runtime`] if their source file is unknown. With a known file they
/// are judged by it: a program may have a `read` of its own.
const RUNTIME_NAMES: [&str; 62] = [
    "malloc",
    "calloc",
    "realloc",
    "reallocarray",
    "free",
    "posix_memalign",
    "aligned_alloc",
    "memalign",
    "valloc",
    "pvalloc",
    "strdup",
    "strndup",
    "_int_malloc",
    "_int_realloc",
    "_int_free",
    "_int_memalign",
    "sysmalloc",
    "malloc_consolidate",
    "alloc_perturb",
    "tcache_init",
    "morecore",
    "__glibc_morecore",
    "__default_morecore",
    "__expand_heap",
    "__malloc_alloc_meta",
    "alloc_slot",
    "alloc_group",
    "brk",
    "__brk",
    "sbrk",
    "__sbrk",
    "mmap",
    "mmap64",
    "__mmap",
    "__mmap64",
    "mremap",
    "__mremap",
    "memcpy",
    "memmove",
    "memset",
    "mempcpy",
    "bzero",
    "read",
    "__read",
    "pread",
    "pread64",
    "readv",
    "fread",
    "recv",
    "recvfrom",
    "recvmsg",
    "write",
    "__write",
    "writev",
    "_start",
    "start_thread",
    "clone",
    "clone3",
    "__clone",
    "_PyObject_Malloc",
    "PyObject_Malloc",
    "_PyObject_Realloc",
];

/// The function of a frame, else `module+0xoffset`, else `[unknown]`. Not escaped.
pub(super) fn label(frame: &Frame) -> String {
    match (&frame.symbol, &frame.module, frame.offset) {
        (Some(symbol), _, _) if !symbol.is_empty() => symbol.clone(),
        (_, Some(module), Some(offset)) => format!("{}+{offset:#x}", file_name(module)),
        (_, Some(module), None) => file_name(module).to_owned(),
        _ => "[unknown]".to_owned(),
    }
}

/// Decides whose code a frame is, by module, then source file, then symbol.
pub(super) fn code_owner(frame: &Frame) -> CodeOwner {
    if frame.kernel {
        return CodeOwner::Kernel;
    }
    let module = frame.module.as_deref().map(file_name).unwrap_or_default();
    if RUNTIME_MODULES.iter().any(|known| module.starts_with(known)) {
        return CodeOwner::Runtime;
    }
    let symbol = frame.symbol.as_deref().unwrap_or_default();
    if symbol.is_empty() && module.is_empty() {
        return CodeOwner::Unknown;
    }
    let file = frame.file.as_deref().unwrap_or_default();
    if RUNTIME_FILES.iter().any(|known| file.contains(known)) || LIBC_FILES.iter().any(|known| file.starts_with(known))
    {
        return CodeOwner::Runtime;
    }
    if RUNTIME_PREFIXES.iter().any(|known| symbol.starts_with(known)) {
        return CodeOwner::Runtime;
    }
    let of_dependency = file.contains("/registry/src/") || file.contains("/.cargo/git/");
    if file.is_empty() {
        // `<alloc::vec::Vec<T> as Trait>::method` may be a method of the program. Without a file
        // there is no evidence for that, and the standard library is far more frequent.
        let implementor = symbol.trim_start_matches(['<', '&', '[', '*']);
        let of_std =
            implementor.len() < symbol.len() && RUNTIME_PREFIXES.iter().take(4).any(|std| implementor.starts_with(std));
        if of_std || RUNTIME_NAMES.contains(&symbol) || symbol.starts_with("__mem") {
            return CodeOwner::Runtime;
        }
    }
    if of_dependency { CodeOwner::Dependency } else { CodeOwner::Program }
}

/// A function's name without generic arguments, trait and C++ parameters:
/// `<app::Cache<u8> as app::Fill>::fill::<u8>` becomes `app::Cache::fill`.
pub(super) fn short_name(symbol: &str) -> String {
    if symbol.contains("operator") {
        return symbol.to_owned();
    }
    // The type of `<Type as Trait>::method` and of `<Type>::method`.
    if let Some(rest) = symbol.strip_prefix('<')
        && let Some(end) = closing_angle(rest)
        && let (Some(inside), Some(after)) = (rest.get(..end), rest.get(end + 1..))
        && after.starts_with("::")
    {
        let implementor = before_as(inside).trim_start_matches("dyn ");
        return format!("{}{}", without_generics(implementor.trim_start_matches('<')), without_generics(after));
    }
    // Parameters of a C++ function.
    let symbol = match symbol.find('(') {
        Some(at) if at > 0 => symbol.get(..at).unwrap_or(symbol),
        _ => symbol,
    };
    without_generics(symbol)
}

/// The last part of a function's name, with its type and its closures: `Cache::fill`,
/// `Cache::fill::{closure#0}`, `main`.
pub(super) fn brief_name(symbol: &str) -> String {
    let short = short_name(symbol);
    let parts: Vec<&str> = short.split("::").filter(|part| !part.is_empty()).collect();
    let is_closure = |part: &&&str| part.contains("closure") || part.contains("{{");
    let kept = 1 + parts.iter().rev().take_while(is_closure).count();
    // A method keeps its type, a function loses its module.
    let typed = (parts.len().checked_sub(kept + 1).and_then(|at| parts.get(at)))
        .is_some_and(|part| part.starts_with(|first: char| first.is_uppercase()));
    let from = parts.len().saturating_sub(kept + usize::from(typed));
    parts.get(from..).map(|parts| parts.join("::")).unwrap_or_default()
}

/// The name as the program's source has it: `memset` for `__memset_avx2_unaligned_erms`, `malloc`
/// for `__GI___libc_malloc`, `Vec::push` for an inlined `push` of `alloc/src/vec`.
pub(super) fn called_name(frame: &Frame) -> String {
    let Some(symbol) = frame.symbol.as_deref().filter(|symbol| !symbol.is_empty()) else {
        return frame.module.as_deref().map_or_else(|| "[unknown]".to_owned(), |module| file_name(module).to_owned());
    };
    let bare = symbol.trim_start_matches("__GI_").trim_start_matches("__libc_").trim_start_matches('_');
    for (variant, name) in [
        ("memset_", "memset"),
        ("memcpy_", "memcpy"),
        ("memmove_", "memcpy/memmove"),
        ("libc_malloc", "malloc"),
        ("libc_calloc", "calloc"),
        ("libc_realloc", "realloc"),
        ("libc_memalign", "memalign"),
        ("Znwm", "operator new"),
        ("Znam", "operator new[]"),
    ] {
        if bare.starts_with(variant) {
            return name.to_owned();
        }
    }
    if !symbol.contains("::")
        && !bare.is_empty()
        && bare != symbol
        && frame.file.as_deref().is_none_or(|f| !f.contains("/rustc/"))
    {
        return bare.to_owned();
    }
    let brief = brief_name(symbol);
    // DWARF names an inlined function without its path; for well-known types the file gives it.
    let file = frame.file.as_deref().unwrap_or_default();
    let of_type = [
        ("/alloc/src/vec/", "Vec"),
        ("/alloc/src/raw_vec", "RawVec"),
        ("/alloc/src/string.rs", "String"),
        ("/alloc/src/boxed", "Box"),
        ("/alloc/src/slice.rs", "slice"),
        ("/alloc/src/collections/vec_deque", "VecDeque"),
        ("/alloc/src/collections/btree", "BTreeMap"),
        ("/std/src/collections/hash/map.rs", "HashMap"),
        ("/std/src/collections/hash/set.rs", "HashSet"),
        ("hashbrown", "HashMap"),
    ];
    match of_type.iter().find(|(part, _)| !brief.contains("::") && file.contains(part)) {
        Some((_, name)) => format!("{name}::{brief}"),
        None => brief,
    }
}

/// A source file without the directories that all files of its project share: from its last `src`
/// on, else its last two parts.
pub(super) fn short_file(file: &str) -> &str {
    let within = |marker: &str| file.rfind(marker).and_then(|at| file.get(at + 1..));
    if let Some(short) = within("/src/").filter(|short| short.len() < file.len()) {
        return short;
    }
    let from = file.rmatch_indices('/').nth(1).map_or(0, |(at, _)| at + 1);
    file.get(from..).unwrap_or(file)
}

/// The last part of a path; the path itself if it ends in `/`.
pub(super) fn file_name(path: &str) -> &str {
    path.rsplit('/').next().filter(|name| !name.is_empty()).unwrap_or(path)
}

/// The byte position of the `>` that closes a `<` before `text`. The one of `->` does not count.
fn closing_angle(text: &str) -> Option<usize> {
    let mut depth = 1usize;
    let mut before = ' ';
    for (at, character) in text.char_indices() {
        match character {
            '<' => depth += 1,
            '>' if before != '-' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at);
        }
        before = character;
    }
    None
}

/// `Type` of `Type as Trait`.
fn before_as(text: &str) -> &str {
    let mut depth = 0usize;
    for (at, character) in text.char_indices() {
        match character {
            '<' => depth += 1,
            '>' => depth = depth.saturating_sub(1),
            ' ' if depth == 0 && text.get(at..).is_some_and(|rest| rest.starts_with(" as ")) => {
                return text.get(..at).unwrap_or(text);
            }
            _ => {}
        }
    }
    text
}

/// `a::B<C>::d::<E>` becomes `a::B::d`.
fn without_generics(text: &str) -> String {
    let mut out = String::new();
    let mut depth = 0usize;
    let mut before = ' ';
    for character in text.chars() {
        match character {
            '<' => depth += 1,
            '>' if depth > 0 && before != '-' => depth -= 1,
            _ if depth == 0 => out.push(character),
            _ => {}
        }
        before = character;
    }
    while out.contains("::::") {
        out = out.replace("::::", "::");
    }
    let out = out.trim_end_matches("::").trim();
    if out.is_empty() { text.to_owned() } else { out.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(module: &str, symbol: &str, file: &str) -> Frame {
        let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        Frame {
            module: some(module),
            symbol: some(symbol),
            file: some(file),
            offset: Some(0x1f3c0),
            ..Frame::default()
        }
    }

    #[test]
    fn whose_code_it_is() {
        use CodeOwner::*;
        let rustc = "/rustc/59807616e1fa2540724bfbac14d7976d7e4a3860/library/alloc/src/vec/mod.rs";
        let registry = "/root/.cargo/registry/src/index-1949cf8c6b5b557f/clap_builder-4.6.7/src/builder/command.rs";
        for (module, symbol, file, wanted) in [
            ("/app", "app::cache::fill", "/build/src/cache.rs", Program),
            ("/app", "fill", "/build/src/cache.rs", Program),
            ("/app", "push<u8, alloc::alloc::Global>", rustc, Runtime),
            ("/app", "alloc::vec::Vec<T,A>::push", "", Runtime),
            ("/app", "<alloc::boxed::Box<F> as core::ops::FnOnce<()>>::call_once", "", Runtime),
            ("/app", "<std::fs::File as std::io::Read>::read", "", Runtime),
            ("/app", "<alloc::vec::Vec<u8> as app::Fill>::fill", "/build/src/cache.rs", Program),
            ("/app", "<app::Cache as app::Fill>::fill", "", Program),
            ("/app", "hashbrown::raw::RawTable<T>::reserve_rehash", "", Runtime),
            ("/app", "reserve_rehash", "/root/.cargo/registry/src/x/hashbrown-0.15.2/src/raw/mod.rs", Runtime),
            ("/app", "group", registry, Dependency),
            ("/app", "read", "/build/src/main.c", Program),
            ("/app", "read", "", Runtime),
            ("/app", "malloc", "", Runtime),
            ("/app", "malloc", "./malloc/malloc.c", Runtime),
            ("/app", "_rjem_je_arena_malloc_hard", "", Runtime),
            ("/app", "mi_malloc", "", Runtime),
            ("/app", "middleware", "", Program),
            ("/app", "tc_new", "", Runtime),
            ("/app", "operator new(unsigned long)", "", Runtime),
            ("/app", "std::vector<int, std::allocator<int> >::push_back(int const&)", "", Runtime),
            ("/app", "_M_realloc_insert", "/usr/include/c++/13/bits/vector.tcc", Runtime),
            ("/app", "__memset_avx2_unaligned_erms", "", Runtime),
            ("/app", "_start", "", Runtime),
            ("/app", "", "", Program),
            ("/usr/lib/x86_64-linux-gnu/libc.so.6", "", "", Runtime),
            ("/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "_dl_relocate_object", "./elf/dl-reloc.c", Runtime),
            ("/lib/ld-musl-x86_64.so.1", "alloc_slot", "", Runtime),
            ("/usr/lib/libjemalloc.so.2", "", "", Runtime),
            ("/usr/lib/libcrypto.so.3", "", "", Program),
            ("/usr/lib/libpython3.11.so.1.0", "list_repeat", "/b/Objects/listobject.c", Program),
            ("/usr/lib/libpython3.11.so.1.0", "new_arena", "/b/Objects/obmalloc.c", Runtime),
            ("", "", "", Unknown),
            ("[jit]", "", "", Program),
        ] {
            assert_eq!(code_owner(&frame(module, symbol, file)), wanted, "{module} {symbol} {file}");
        }
        assert_eq!(code_owner(&Frame { kernel: true, ..frame("", "handle_mm_fault", "") }), Kernel);
    }

    #[test]
    fn labels() {
        assert_eq!(label(&frame("/a/b.so", "f<T>", "")), "f<T>");
        assert_eq!(label(&frame("/a/b.so", "", "")), "b.so+0x1f3c0");
        assert_eq!(label(&Frame { offset: None, ..frame("[jit]", "", "") }), "[jit]");
        assert_eq!(label(&Frame::default()), "[unknown]");
    }

    #[test]
    fn names_without_noise() {
        for (symbol, wanted, briefly) in [
            ("app::cache::fill", "app::cache::fill", "fill"),
            ("<app::Cache<u8> as app::Fill>::fill::<u8>", "app::Cache::fill", "Cache::fill"),
            ("<app::Cache>::fill::{closure#0}", "app::Cache::fill::{closure#0}", "Cache::fill::{closure#0}"),
            ("app::main::{{closure}}", "app::main::{{closure}}", "main::{{closure}}"),
            ("alloc::vec::Vec<T,A>::push", "alloc::vec::Vec::push", "Vec::push"),
            ("call_once<fn() -> std::process::ExitCode, ()>", "call_once", "call_once"),
            ("{closure#0}<a::b, c>", "{closure#0}", "{closure#0}"),
            ("ns::Store::add(int, char const*)", "ns::Store::add", "Store::add"),
            ("operator new(unsigned long)", "operator new(unsigned long)", "operator new(unsigned long)"),
            ("<", "<", "<"),
            ("", "", ""),
        ] {
            assert_eq!(short_name(symbol), wanted, "{symbol}");
            assert_eq!(brief_name(symbol), briefly, "{symbol}");
        }
    }

    #[test]
    fn what_was_called() {
        for (symbol, file, wanted) in [
            ("__memset_avx512_unaligned_erms", "./string/memset.S", "memset"),
            ("__GI___libc_malloc", "./malloc/malloc.c", "malloc"),
            ("__libc_calloc", "", "calloc"),
            ("__read", "", "read"),
            ("push<u8, alloc::alloc::Global>", "/rustc/x/library/alloc/src/vec/mod.rs", "Vec::push"),
            ("alloc::vec::Vec<T,A>::with_capacity", "", "Vec::with_capacity"),
        ] {
            assert_eq!(called_name(&frame("/lib/x", symbol, file)), wanted);
        }
    }

    #[test]
    fn files_are_short() {
        assert_eq!(short_file("/build/app/tests/src/bin/memory.rs"), "src/bin/memory.rs");
        assert_eq!(short_file("/tmp/Python-3.11.7/Objects/listobject.c"), "Objects/listobject.c");
        assert_eq!(short_file("src/cache.rs"), "src/cache.rs");
        assert_eq!(short_file("main.c"), "main.c");
        assert_eq!(short_file(""), "");
    }

    proptest::proptest! {
        #[test]
        fn no_name_panics(symbol in "[<>:a {}()#&-]{0,40}", file in ".*") {
            let _ = (short_name(&symbol), brief_name(&symbol), short_file(&file).len());
            let frame = frame("/m", &symbol, &file);
            let _ = (label(&frame), code_owner(&frame), called_name(&frame));
        }
    }
}
