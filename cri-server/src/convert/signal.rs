//! CRI's signals, which are numbered in their own way, and Linux's.

use berth_proto::runtime_v1::Signal;

/// Every signal with its Linux number. Where CRI has two names for one number,
/// the one Linux prefers comes first.
/// Source: signal(7), x86 and ARM; SIGRTMIN is 34 as glibc and musl reserve two.
const NUMBERS: [(Signal, i32); 65] = [
    (Signal::Sigabrt, 6),
    (Signal::Sigalrm, 14),
    (Signal::Sigbus, 7),
    (Signal::Sigchld, 17),
    (Signal::Sigcld, 17),
    (Signal::Sigcont, 18),
    (Signal::Sigfpe, 8),
    (Signal::Sighup, 1),
    (Signal::Sigill, 4),
    (Signal::Sigint, 2),
    (Signal::Sigio, 29),
    (Signal::Sigiot, 6),
    (Signal::Sigkill, 9),
    (Signal::Sigpipe, 13),
    (Signal::Sigpoll, 29),
    (Signal::Sigprof, 27),
    (Signal::Sigpwr, 30),
    (Signal::Sigquit, 3),
    (Signal::Sigsegv, 11),
    (Signal::Sigstkflt, 16),
    (Signal::Sigstop, 19),
    (Signal::Sigsys, 31),
    (Signal::Sigterm, 15),
    (Signal::Sigtrap, 5),
    (Signal::Sigtstp, 20),
    (Signal::Sigttin, 21),
    (Signal::Sigttou, 22),
    (Signal::Sigurg, 23),
    (Signal::Sigusr1, 10),
    (Signal::Sigusr2, 12),
    (Signal::Sigvtalrm, 26),
    (Signal::Sigwinch, 28),
    (Signal::Sigxcpu, 24),
    (Signal::Sigxfsz, 25),
    (Signal::Sigrtmin, 34),
    (Signal::Sigrtminplus1, 35),
    (Signal::Sigrtminplus2, 36),
    (Signal::Sigrtminplus3, 37),
    (Signal::Sigrtminplus4, 38),
    (Signal::Sigrtminplus5, 39),
    (Signal::Sigrtminplus6, 40),
    (Signal::Sigrtminplus7, 41),
    (Signal::Sigrtminplus8, 42),
    (Signal::Sigrtminplus9, 43),
    (Signal::Sigrtminplus10, 44),
    (Signal::Sigrtminplus11, 45),
    (Signal::Sigrtminplus12, 46),
    (Signal::Sigrtminplus13, 47),
    (Signal::Sigrtminplus14, 48),
    (Signal::Sigrtminplus15, 49),
    (Signal::Sigrtmaxminus14, 50),
    (Signal::Sigrtmaxminus13, 51),
    (Signal::Sigrtmaxminus12, 52),
    (Signal::Sigrtmaxminus11, 53),
    (Signal::Sigrtmaxminus10, 54),
    (Signal::Sigrtmaxminus9, 55),
    (Signal::Sigrtmaxminus8, 56),
    (Signal::Sigrtmaxminus7, 57),
    (Signal::Sigrtmaxminus6, 58),
    (Signal::Sigrtmaxminus5, 59),
    (Signal::Sigrtmaxminus4, 60),
    (Signal::Sigrtmaxminus3, 61),
    (Signal::Sigrtmaxminus2, 62),
    (Signal::Sigrtmaxminus1, 63),
    (Signal::Sigrtmax, 64),
];

/// The Linux number; `None` for "whatever the image says".
pub fn number(signal: Signal) -> Option<i32> {
    NUMBERS
        .iter()
        .find(|(known, _)| *known == signal)
        .map(|(_, number)| *number)
}

/// CRI's signal for a Linux number; `RuntimeDefault` for numbers without one.
pub fn from_number(number: i32) -> Signal {
    NUMBERS
        .iter()
        .find(|(_, known)| *known == number)
        .map_or(Signal::RuntimeDefault, |(signal, _)| *signal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_has_a_number_and_every_number_comes_back() {
        for value in 1..=65 {
            let signal = Signal::try_from(value).unwrap();
            let number = number(signal).unwrap_or_else(|| panic!("{signal:?}"));
            assert_eq!(
                super::number(from_number(number)),
                Some(number),
                "{signal:?}"
            );
        }
        assert_eq!(number(Signal::RuntimeDefault), None);
        assert_eq!(from_number(32), Signal::RuntimeDefault);
    }

    #[test]
    fn the_usual_ones_are_what_everybody_knows() {
        assert_eq!(from_number(15), Signal::Sigterm);
        assert_eq!(from_number(17), Signal::Sigchld);
        assert_eq!(number(Signal::Sigrtminplus15), Some(49));
        assert_eq!(number(Signal::Sigrtmaxminus14), Some(50));
    }
}
